"""Science text before and after a model refined it: the two sources of `designs/refinement.yaml`.

    python examples/ablations/refine.py                    after prepare.py and `make quickstart`
    python examples/ablations/refine.py --url http://127.0.0.1:8000/v1 --model openai/gpt-oss-120b --prompt edit_lines

Level 4 of Data Darwinism as a program of edits: the model says which lines go and which strings are mended, gates see
to it that nothing is lost, and what fails stays as it was. Without --url the quickstart's own model is asked, which
has four million parameters and no notion of the task; the design then measures what that costs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart_levels"))

from documents import digest
from run import asked

from megatron_davinci.cli.main import guarded
from megatron_davinci.darwin.recipe import load_recipe
from megatron_davinci.darwin.run import run_recipe
from megatron_davinci.data.manifest import Manifest
from megatron_davinci.data.tokenize import tokenize_jsonl
from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.errors import DataError
from megatron_davinci.files import write_atomically

HERE = Path(__file__).resolve().parent
FOLDER = Path("runs/ablations-data")
CHARACTERS = 450_000
"""Of science text, some 180,000 tokens: a run of the laptop designs draws 138,000."""
LONGEST = 2_000


def main() -> int:
    """Choose the text, refine it, write both sources."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="of `make quickstart`")
    parser.add_argument(
        "--url", help="of another server, up to and with /v1; without it the run's model is served"
    )
    parser.add_argument("--model", default="quickstart", help="as the server calls it")
    parser.add_argument(
        "--prompt", default="levels/edit.yaml", help="of `refine`: a name of the package's, or a file"
    )
    return guarded(lambda: refine(parser.parse_args()))


def refine(given: argparse.Namespace) -> int:
    """As `main`, with what was given."""
    chosen = FOLDER / "text" / "science.chosen.jsonl"
    write_atomically(chosen, "".join(choose(FOLDER / "text" / "science.train.jsonl")))
    write_atomically(FOLDER / "levels" / "edit.yaml", (HERE / "levels" / "edit.yaml").read_bytes())
    recipe: dict[str, Any] = yaml.safe_load((HERE / "levels" / "level4.yaml").read_text(encoding="utf-8"))
    [step] = recipe["steps"]
    step["refine"]["prompt"] = given.prompt
    if given.prompt != "levels/edit.yaml":
        step["refine"]["chunk"], step["refine"]["endpoint"]["max_tokens"] = 1024, 2048
    with asked(given) as url:
        step["refine"]["endpoint"] |= {"url": url, "model": given.model}
        path = FOLDER / "level4.yaml"
        write_atomically(path, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode())
        corpus = run_recipe(load_recipe(path))
    counts = json.loads((corpus.folder / "statistics.json").read_text(encoding="utf-8"))["counts"]
    for name, count in sorted(counts.items()):
        if name.startswith("refine/"):
            print(f"{count:>8,}  {name.removeprefix('refine/')}")
    tokenizer = Tokenizer.load(FOLDER / "tokenizer")
    for name, paths in (("science.level3", [chosen]), ("science.level4", corpus.files())):
        if not (FOLDER / name / "manifest.json").exists():
            tokenize_jsonl(paths, tokenizer, FOLDER / name, name, "science")
        print(f"{name}: {Manifest.load(FOLDER / name).tokens:,} tokens")
    return 0


def choose(path: Path) -> list[str]:
    """Lines of documents of at most `LONGEST` characters, in an order keyed by their ids, `CHARACTERS` of text.

    Raises:
        DataError: There is not so much.
    """
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    records = [one for one in records if len(one["text"]) <= LONGEST]
    kept, size = [], 0
    for record in sorted(records, key=lambda one: digest(0, one["id"])):
        if size >= CHARACTERS:
            return kept
        kept.append(json.dumps(record, ensure_ascii=False) + "\n")
        size += len(record["text"])
    raise DataError(
        "There is too little science text to refine.",
        where=path,
        found=f"{size:,} characters in documents of at most {LONGEST:,}",
        expected=f"{CHARACTERS:,}",
        do="make it anew with prepare.py, with numpy and torch installed",
    )


if __name__ == "__main__":
    sys.exit(main())
