"""`davinci convert`: between checkpoints of ours, Hugging Face's and Megatron-LM's, and means of ours."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_davinci.cli import convert_average, convert_from_hf, convert_release, convert_to_hf
from megatron_davinci.config.model import ModelConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    convert_to_hf.add_arguments(directions.add_parser("to-hf", help="write a folder that transformers loads"))
    convert_from_hf.add_arguments(
        directions.add_parser("from-hf", help="take the weights of a Hugging Face model")
    )
    convert_release.add_release_arguments(
        directions.add_parser("release", help="write all kept checkpoints of a run as a tree of folders")
    )
    convert_release.add_push_arguments(
        directions.add_parser("push", help="upload such folders to the Hugging Face hub, with your token")
    )
    from_megatron = directions.add_parser(
        "from-megatron", help="take the weights of a GPT checkpoint that Megatron-LM saved (torch_dist)"
    )
    from_megatron.add_argument(
        "checkpoint", type=Path, help="an iter_XXXXXXX folder, or the one that Megatron-LM saves them in"
    )
    from_megatron.add_argument("out", type=Path, help="the checkpoint's folder to make")

    convert_average.add_arguments(
        directions.add_parser("average", help="the mean of several checkpoints' weights, as a checkpoint")
    )


def run(arguments: argparse.Namespace) -> int:
    """Convert."""
    if arguments.direction == "to-hf":
        return convert_to_hf.run(arguments)
    if arguments.direction == "from-hf":
        return convert_from_hf.run(arguments)
    if arguments.direction == "average":
        return convert_average.run(arguments)
    if arguments.direction in ("release", "push"):
        return {"release": convert_release.release, "push": convert_release.push}[arguments.direction](
            arguments
        )
    import_checkpoint(arguments.checkpoint, arguments.out)
    return 0


def import_checkpoint(checkpoint: Path, out: Path) -> None:
    """Make a checkpoint of ours of one that Megatron-LM saved, and say what was not carried over.

    Args:
        checkpoint: `iter_XXXXXXX`, or the folder that it is in.
        out: The folder to make.
    """
    import yaml

    from megatron_davinci.cli.convert_new import new_checkpoint
    from megatron_davinci.convert.megatron_checkpoint import MegatronCheckpoint
    from megatron_davinci.train import checkpoint_files
    from megatron_davinci.train.new_files import NewFiles

    found = MegatronCheckpoint.of(checkpoint)
    with new_checkpoint(out) as temporary:
        files = NewFiles(temporary)
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
    parameters = ModelConfig.model_validate(found.model).parameters()
    print(f"{out}: the weights of {found.folder}, {parameters:,} parameters")
    for line in found.left:
        print(f"not carried over: {line}")
    print("\nIn the configuration of a run that begins with them:\n")
    model = {key: value for key, value in found.model.items() if key not in ("preset", "layers", "dropout")}
    print(yaml.safe_dump({"model": model, "checkpoint": {"initial_weights": str(out)}}, sort_keys=False))
