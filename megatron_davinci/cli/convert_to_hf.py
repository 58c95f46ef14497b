"""`davinci convert to-hf`: a checkpoint becomes a folder that transformers loads."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_davinci.config import RunConfig, load_config
from megatron_davinci.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from megatron_davinci.train.checkpoint_files import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "run",
        help="run directory, RUN@STEP for a checkpoint that is not the newest, or a checkpoint's folder",
    )
    parser.add_argument("out", type=Path, nargs="?", help="folder to make (default: RUN/hf/step-XXXXXXXX)")
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        dest="of_run",
        help="whose a checkpoint's folder is, for card and tokenizer",
    )
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer (default: the run's)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    parser.add_argument("--skip-verify", action="store_true", help="do not hold it against transformers")
    parser.add_argument("--licence", metavar="ID", help="for the model card, such as apache-2.0")
    parser.add_argument("--family", help="write it as this family (default: by the model)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one a core)")


def run(arguments: argparse.Namespace) -> int:
    """Export."""
    print(
        export(
            arguments.run,
            arguments.out,
            dtype=arguments.dtype,
            tokenizer=arguments.tokenizer,
            family=arguments.family,
            verify=not arguments.skip_verify,
            licence=arguments.licence,
            of_run=arguments.of_run,
            threads=arguments.threads,
        )
    )
    return 0


@dataclass(frozen=True)
class Found:
    """A checkpoint that is to be exported.

    Attributes:
        checkpoint: The checkpoint.
        run: The run directory that it is of; None for one by itself.
        config: The run's configuration.
    """

    checkpoint: Checkpoint
    run: Path | None
    config: RunConfig | None


def find(run_name: str) -> Found:
    """Find a checkpoint: `RUN`, `RUN@STEP`, or its own folder.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    from megatron_davinci.train import checkpoint_files

    # What is read of the tensors is checked as it is read; to hash the optimizer's state too would take longer than
    # the export.
    alone = Path(run_name)
    if (alone / "state").is_dir():
        return Found(checkpoint_files.read(alone, verify=False), None, None)
    folder, _, step = run_name.rpartition("@") if "@" in Path(run_name).name else (run_name, "", "")
    checkpoints = Path(folder) / "checkpoints"
    if step:
        if not step.isdigit():
            raise CheckpointError(
                "The step is not a number.", where=run_name, expected="RUN@STEP, as in runs/a@500"
            )
        folder_of_step = checkpoint_files.step_folder(checkpoints, int(step))
        if not folder_of_step.exists():
            there = [str(checkpoint_files.step_of(one)) for one in checkpoint_files.steps(checkpoints)]
            raise CheckpointError(
                "The run has no checkpoint of this step.",
                where=run_name,
                found=f"steps {', '.join(reversed(there))}" if there else "no checkpoint at all",
                do="name one that is there; checkpoint.keep, keep_every and keep_best say which stay",
            )
        checkpoint = checkpoint_files.read(folder_of_step, verify=False)
    else:
        newest, problems = checkpoint_files.newest_good(checkpoints)
        if newest is None:
            raise CheckpointError(
                "The run has no good checkpoint.",
                where=checkpoints,
                found="\n".join(str(problem) for problem in problems) or "none at all",
                do="train first, or check the run directory's path",
            )
        checkpoint = newest
    return Found(checkpoint, Path(folder), load_config(Path(folder) / "config.yaml"))


def export(
    run_name: str,
    out: Path | None = None,
    *,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    family: str | None = None,
    verify: bool = True,
    licence: str | None = None,
    of_run: Path | None = None,
    threads: int | None = None,
) -> Path:
    """Export a checkpoint of a run, or one by itself.

    Args:
        run_name: `RUN` or `RUN@STEP`, or the folder of a checkpoint.
        out: The folder to make; default `RUN/hf/step-XXXXXXXX`.
        dtype: See `convert.export.export_to_hf`.
        tokenizer: Its folder; default: the run's.
        family: Name of the family to write; default: by the model.
        verify: Hold it against transformers before it appears.
        licence: For the model card.
        of_run: The run directory that a checkpoint's folder is of.
        threads: CPU threads; default: one a core.
    """
    from megatron_davinci.cli.convert_progress import bar
    from megatron_davinci.cli.convert_verify import verified
    from megatron_davinci.convert.card import Release, write_card
    from megatron_davinci.convert.export import DTYPES, export_to_hf, read_config
    from megatron_davinci.convert.families import family_named, family_of

    if threads is not None and threads < 1:
        raise ConfigError(
            "A conversion needs a thread.", where="--threads", found=threads, expected="1 or more"
        )
    found = find(run_name)
    if of_run is not None:
        if found.run is not None:
            raise ConfigError(
                "A run's own checkpoint is of no other run.",
                where="--run",
                found=of_run,
                expected=f"a checkpoint's folder before it, where there is {run_name}",
                do="leave --run out",
            )
        found = Found(found.checkpoint, of_run, load_config(of_run / "config.yaml"))
    if out is None:
        if found.run is None:
            raise ConfigError(
                "A checkpoint by itself does not say where its export belongs.",
                where=run_name,
                do="name the folder to make: davinci convert to-hf CHECKPOINT OUT",
            )
        out = found.run / "hf" / found.checkpoint.folder.name
    if tokenizer is None and found.config is not None:
        tokenizer = found.config.data.tokenizer
    state, model = found.checkpoint.state, found.checkpoint.manifest["model"]
    written = family_named(family, "--family") if family else family_of(model)

    def finish(folder: Path) -> None:
        said = None
        if verify:
            kind = DTYPES[dtype] if dtype else None
            said = verified(folder, state, written, model, tokenizer=tokenizer, dtype=kind, threads=threads)
        write_card(
            folder,
            Release(
                family=written,
                model=model,
                checkpoint=found.checkpoint.manifest,
                dtype=read_config(folder)["torch_dtype"],
                run=found.run,
                verification=said.facts() if said else None,
                verified=str(said) if said else None,
                licence=licence,
                tokenizer=(folder / "tokenizer.json").exists(),
            ),
        )

    with bar(f"exporting {out.name}") as progress:
        return export_to_hf(
            state,
            model,
            out,
            tokenizer=tokenizer,
            eod_id=end_of_documents(found.config, tokenizer),
            dtype=dtype,
            family=written,
            progress=progress,
            finish=finish,
        )


def end_of_documents(config: RunConfig | None, tokenizer: Path | None) -> int | None:
    """The token that a model ends a text with: what ended the documents that it was trained on.

    Args:
        config: The run's; None for a checkpoint by itself.
        tokenizer: The tokenizer's folder; None: no token is named.

    Raises:
        DataError: No source that is here says it, and the tokenizer has no such token.
    """
    from megatron_davinci.data import run_tokenizer
    from megatron_davinci.data.tokenizer import Tokenizer

    if tokenizer is None:
        return None
    sources = run_tokenizer.manifests(None if config is None else config.data, remote=False)
    said = run_tokenizer.end_of_documents(sources.values())
    return Tokenizer.load(tokenizer).eod_id if said is None else said
