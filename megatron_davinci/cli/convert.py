"""`davinci convert`: a checkpoint to Hugging Face (`to-hf`), and one of Megatron-LM to ours (`from-megatron`)."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from megatron_davinci.config import load_config
from megatron_davinci.config.model import ModelConfig
from megatron_davinci.errors import CheckpointError, ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    to_hf = directions.add_parser("to-hf", help="write a folder that transformers loads")
    to_hf.add_argument(
        "run",
        help="run directory, RUN@STEP for a checkpoint that is not the newest, or a checkpoint's folder",
    )
    to_hf.add_argument("out", type=Path, nargs="?", help="folder to make (default: RUN/hf/step-XXXXXXXX)")
    to_hf.add_argument("--tokenizer", type=Path, help="folder of the tokenizer (default: the run's)")
    to_hf.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as stored")
    from_megatron = directions.add_parser(
        "from-megatron", help="take the weights of a GPT checkpoint that Megatron-LM saved (torch_dist)"
    )
    from_megatron.add_argument(
        "checkpoint", type=Path, help="an iter_XXXXXXX folder, or the one that Megatron-LM saves them in"
    )
    from_megatron.add_argument("out", type=Path, help="the checkpoint's folder to make")


def run(arguments: argparse.Namespace) -> int:
    """Convert."""
    if arguments.direction == "from-megatron":
        import_checkpoint(arguments.checkpoint, arguments.out)
    else:
        print(export(arguments.run, arguments.out, arguments.dtype, arguments.tokenizer))
    return 0


def import_checkpoint(checkpoint: Path, out: Path) -> None:
    """Make a checkpoint of ours of one that Megatron-LM saved, and say what was not carried over.

    Args:
        checkpoint: `iter_XXXXXXX`, or the folder that it is in.
        out: The folder to make.
    """
    import yaml

    from megatron_davinci.convert.megatron_checkpoint import MegatronCheckpoint
    from megatron_davinci.train import checkpoint_files

    if out.exists():
        raise ConfigError("The checkpoint's folder is there already.", where=out, do="choose another")
    found = MegatronCheckpoint.of(checkpoint)
    temporary = checkpoint_files.begin(out.parent, 0)
    try:
        files = checkpoint_files.NewFiles(temporary)
        found.write(temporary / "state", files.open)
        description = {
            "step": 0,
            "consumed_samples": 0,
            "model": found.model,
            "weights_only": True,
            "from": {
                "program": "Megatron-LM",
                "folder": str(found.folder.resolve()),
                "iteration": found.iteration,
            },
        }
        checkpoint_files.commit(temporary, out, description, files.entries, latest=False)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    parameters = ModelConfig.model_validate(found.model).parameters()
    print(f"{out}: the weights of {found.folder}, {parameters:,} parameters")
    for line in found.left:
        print(f"not carried over: {line}")
    print("\nIn the configuration of a run that begins with them:\n")
    model = {key: value for key, value in found.model.items() if key not in ("preset", "layers", "dropout")}
    print(yaml.safe_dump({"model": model, "checkpoint": {"initial_weights": str(out)}}, sort_keys=False))


def export(
    run_name: str, out: Path | None = None, dtype: str | None = None, tokenizer: Path | None = None
) -> Path:
    """Export a checkpoint of a run, or one by itself.

    Args:
        run_name: `RUN` or `RUN@STEP`, or the folder of a checkpoint.
        out: The folder to make; default `RUN/hf/step-XXXXXXXX`.
        dtype: See `convert.export.export_to_hf`.
        tokenizer: Its folder; default: the run's.
    """
    from megatron_davinci.convert.export import export_to_hf
    from megatron_davinci.data.tokenizer import Tokenizer
    from megatron_davinci.train import checkpoint_files

    alone = Path(run_name)
    if (alone / "state").is_dir():
        if out is None:
            raise ConfigError(
                "A checkpoint by itself does not say where its export belongs.",
                where=alone,
                do="name the folder to make: davinci convert to-hf CHECKPOINT OUT",
            )
        checkpoint = checkpoint_files.read(alone)
        return export_to_hf(
            checkpoint.state,
            checkpoint.manifest["model"],
            out,
            tokenizer=tokenizer,
            eod_id=Tokenizer.load(tokenizer).eod_id if tokenizer else None,
            dtype=dtype,
        )
    folder, _, step = run_name.rpartition("@") if "@" in Path(run_name).name else (run_name, "", "")
    checkpoints = Path(folder) / "checkpoints"
    if step:
        if not step.isdigit():
            raise CheckpointError(
                "The step is not a number.", where=run_name, expected="RUN@STEP, as in runs/a@500"
            )
        checkpoint = checkpoint_files.read(checkpoint_files.step_folder(checkpoints, int(step)))
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
    config = load_config(Path(folder) / "config.yaml")
    tokenizer = tokenizer or config.data.tokenizer
    return export_to_hf(
        checkpoint.state,
        checkpoint.manifest["model"],
        out or Path(folder) / "hf" / checkpoint.folder.name,
        tokenizer=tokenizer,
        eod_id=Tokenizer.load(tokenizer).eod_id if tokenizer else None,
        dtype=dtype,
    )
