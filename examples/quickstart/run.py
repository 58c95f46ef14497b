"""`make quickstart`: from the text on this machine to a trained, evaluated, exported model, with a page about it.

Each step is a command or a library call that a cluster uses too; the work is in the package. Nothing is downloaded.
What is there already is kept, and an interrupted training goes on: starting again is always safe.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from rich.console import Console

import megatron_davinci  # noqa: F401
from megatron_davinci.cli.main import guarded
from megatron_davinci.config import RunConfig, load_config
from megatron_davinci.errors import DavinciError

HERE = Path(__file__).resolve().parent
DATA = Path("runs/quickstart-data")
DOMAINS = ("general", "code", "science", "qa")
VOCABULARY = 4096


def main() -> int:
    """Run every step.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(HERE / "config.yaml"))
    parser.add_argument("--ranks", type=int, default=None, help="default: 2, or 1 on a machine with one GPU")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    arguments = parser.parse_args()
    return guarded(lambda: quickstart(arguments.config, arguments.overrides, arguments.ranks))


def quickstart(config_path: str, overrides: list[str], ranks: int | None) -> int:
    """Text, tokenizer, datasets, training, comparison, export, page."""
    begin = time.perf_counter()
    say = Console(highlight=False)
    config = load_config(config_path, overrides)
    run = config.run.directory

    prepare_data(say)
    say.rule("[b]4/7[/b] train through four sub-stages")
    train(config, config_path, overrides, ranks)
    say.rule("[b]5/7[/b] compare with a bigram model of the same tokens")
    from compare import compare

    summary = compare(config)
    say.rule("[b]6/7[/b] export to Hugging Face and let it write")
    from write import write_samples

    exported = export(run)
    write_samples(exported, config, run / "samples.json")
    say.print(f"exported to {exported}, loaded by plain transformers")
    say.rule("[b]7/7[/b] draw the page")
    from megatron_davinci.files import write_json
    from megatron_davinci.report.run import write_run_report

    summary["seconds"] = round(time.perf_counter() - begin, 1)
    write_json(run / "summary.json", summary)
    page = write_run_report(run)
    show(say, config, summary, page, exported)
    return 0


def prepare_data(say: Console) -> None:
    """Gather text, make the corpus, train the tokenizer, write the datasets; what is whole already is kept."""
    from corpus import build_corpus

    from megatron_davinci.data.manifest import Manifest
    from megatron_davinci.data.tokenize import tokenize_jsonl
    from megatron_davinci.data.tokenizer import Tokenizer, train_bpe

    text = DATA / "text"
    files = {(d, side): text / f"{d}.{side}.jsonl" for d in DOMAINS for side in ("train", "valid")}
    say.rule("[b]1/7[/b] gather text from this machine, and take it through Data Darwinism's levels 0 to 3")
    if not all(path.exists() for path in files.values()):
        build_corpus(text)
    for domain in DOMAINS:
        sizes = [files[domain, side].stat().st_size / 1e6 for side in ("train", "valid")]
        say.print(f"{domain:<8} {sizes[0]:6.1f} MB to train on, {sizes[1]:.1f} MB held out")
    corpus = make_corpus()
    say.rule("[b]2/7[/b] train a byte-level BPE tokenizer")
    if not (DATA / "tokenizer" / "tokenizer.json").exists():
        train_bpe([path for d in DOMAINS for path in corpus[d, "train"]], VOCABULARY, DATA / "tokenizer")
    tokenizer = Tokenizer.load(DATA / "tokenizer")
    say.print(f"{tokenizer.vocab_size:,} tokens, in {DATA / 'tokenizer'}")
    say.rule("[b]3/7[/b] write .bin/.idx datasets")
    for (domain, side), paths in corpus.items():
        folder = DATA / f"{domain}.{side}"
        if (folder / "manifest.json").exists():
            manifest = Manifest.load(folder)
        else:
            manifest = tokenize_jsonl(paths, tokenizer, folder, domain, domain)
        say.print(f"{folder}: {manifest.documents:,} documents, {manifest.tokens:,} tokens")


def make_corpus() -> dict[tuple[str, str], list[Path]]:
    """Do what `davinci data train-classifier` and `davinci data run` do, and say what became of the documents.

    Returns:
        The corpus's files by domain and side.
    """
    import json

    from megatron_davinci.cli.data_run import show_corpus, shown
    from megatron_davinci.darwin.classifiers import train_and_judge
    from megatron_davinci.darwin.page import write_corpus_report
    from megatron_davinci.darwin.recipe import load_recipe
    from megatron_davinci.darwin.run import run_recipe
    from megatron_davinci.files import write_atomically

    classifier = DATA / "classifier"
    if not (classifier / "classifier.json").exists():
        held_out = [
            (DATA / "text" / f"{domain}.valid.jsonl").read_text(encoding="utf-8") for domain in DOMAINS
        ]
        records = [json.loads(line) for text in held_out for line in text.split("\n") if line]
        texts, domains = ([record[field] for record in records] for field in ("text", "domain"))
        train_and_judge(texts, domains, bits=16).save(classifier)
    recipe = DATA / "corpus.yaml"
    write_atomically(recipe, (HERE / "corpus.yaml").read_bytes())
    with shown("corpus") as progress:
        corpus = run_recipe(load_recipe(recipe), progress=progress)
    show_corpus(corpus)
    write_corpus_report(corpus)
    print(corpus.folder / "report.html")
    sides = [(domain, side) for domain in DOMAINS for side in ("train", "valid")]
    return {
        (domain, side): [path for path in corpus.files() if path.parent.name == f"{domain}.{side}"]
        for domain, side in sides
    }


def train(config: RunConfig, config_path: str, overrides: list[str], ranks: int | None) -> None:
    """Do what `davinci train` does: start the ranks, and go on from a checkpoint if there is one."""
    from megatron_davinci.platform.device import count_gpus
    from megatron_davinci.train.launch import Watched, launch

    watched = Watched(config.run.directory, config.health.grace_seconds)
    code = launch(config_path, overrides, ranks or min(count_gpus() or 2, 2), watched)
    if code:
        raise DavinciError(
            "Training stopped.",
            found=f"exit code {code}",
            do="mend what was said above, then `make quickstart` again: it goes on from the newest checkpoint",
        )


def export(run: Path) -> Path:
    """Export the newest checkpoint; an older export of it is replaced."""
    from megatron_davinci.cli.convert_to_hf import export as export_run
    from megatron_davinci.train import checkpoint_files

    newest, _ = checkpoint_files.newest_good(run / "checkpoints")
    if newest is not None:
        shutil.rmtree(run / "hf" / newest.folder.name, ignore_errors=True)
    return export_run(str(run), dtype="float32")


def show(say: Console, config: RunConfig, summary: dict, page: Path, exported: Path) -> None:
    """Say what came out, where it lies, and what to try next."""
    from rich.table import Table

    table = Table(header_style="bold")
    for column in ("domain", "held-out loss", "bigram (Kneser-Ney)", "difference", "bits per byte"):
        table.add_column(column, justify="left" if column == "domain" else "right")
    for domain, loss in summary["heldout_loss"].items():
        bigram = summary["bigram_loss"][domain]
        bits = f"{summary['heldout_bits_per_byte'][domain]:.3f}"
        table.add_row(domain, f"{loss:.3f}", f"{bigram:.3f}", f"{loss - bigram:+.3f}", bits)
    say.print(table)
    say.print(
        f"nats a token; both models saw the same {summary['tokens']:,} tokens. {summary['seconds']:.0f} s in all.\n"
    )
    run = config.run.directory
    say.print(f"[b]page[/b]         {page}", soft_wrap=True)
    say.print(f"[b]model[/b]        {exported}", soft_wrap=True)
    say.print(f"[b]run record[/b]   {run}", soft_wrap=True)
    say.print("\n[b]Try next[/b]")
    relative = os.path.relpath(HERE / "config.yaml")
    binary = os.path.relpath(Path(sys.executable).parent / "davinci")
    say.print(f"  {binary} plan examples/davinci_3b/config.yaml --ranks 256", soft_wrap=True)
    say.print(
        f"  {binary} train {relative} --ranks 2 parallel.tensor=2 run.directory=runs/tensor-parallel",
        soft_wrap=True,
    )
    say.print(
        f"  tensorboard --logdir {run / 'tensorboard'}".replace(
            "tensorboard", f"{os.path.dirname(binary)}/tensorboard", 1
        ),
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
