"""`davinci convert average`: the weighted mean of several checkpoints' weights, as a checkpoint."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_davinci.cli.convert_to_hf import find
from megatron_davinci.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from megatron_davinci.train.checkpoint_files import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="checkpoint",
        help="run directory (its newest), RUN@STEP or RUN@STEP,STEP,…, or a checkpoint's folder",
    )
    parser.add_argument("out", type=Path, help="the checkpoint's folder to make")
    parser.add_argument("--last", type=int, metavar="N", help="the N newest of each run that is named alone")
    parser.add_argument(
        "--weights",
        default="equal",
        metavar="HOW",
        help="equal (the default); linear: 1, 2, 3, … in the order of the checkpoints; a number below 1: each "
        "weighs so much of what the next one does; or a number for each, with commas between",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of what is written (default: float32, since a mean has more places than what it is of)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Average."""
    average(
        arguments.checkpoints,
        arguments.out,
        last=arguments.last,
        weights=arguments.weights,
        dtype=arguments.dtype,
    )
    return 0


def average(
    names: list[str],
    out: Path,
    *,
    last: int | None = None,
    weights: str = "equal",
    dtype: str = "float32",
) -> None:
    """Make a checkpoint of the mean of others, and say of which, and how a run begins with it.

    Args:
        names: `RUN`, `RUN@STEP`, `RUN@STEP,STEP` or folders of checkpoints.
        out: The folder to make.
        last: How many of the newest of each `RUN`; None for its newest alone.
        weights: See `shares_of`.
        dtype: Of what is written.

    Raises:
        ConfigError: `out` is there, the words of `weights` are wrong, or there are fewer than two checkpoints.
        CheckpointError: One of them is missing, damaged, of another model, or has numbers that are not finite.
    """
    import yaml

    from megatron_davinci.cli.convert_new import new_checkpoint
    from megatron_davinci.cli.convert_progress import bar
    from megatron_davinci.convert.averaging import Part, write_mean
    from megatron_davinci.convert.export import DTYPES
    from megatron_davinci.train import checkpoint_files
    from megatron_davinci.train.new_files import NewFiles

    found = _all_of(names, last)
    shares = shares_of(weights, len(found))
    newest = max(found, key=lambda one: one.consumed_samples)
    model = newest.manifest["model"]
    for one in found:
        _check_same_model(one, newest)
    with new_checkpoint(out) as temporary:
        files = NewFiles(temporary)
        parts = [Part(one.folder, one.state, share) for one, share in zip(found, shares, strict=True)]
        with bar(f"averaging {len(parts)} checkpoints") as progress:
            write_mean(parts, temporary / "state", files.open, dtype=DTYPES[dtype], progress=progress)
        description = {
            "step": newest.step,
            "consumed_samples": newest.consumed_samples,
            **{name: newest.manifest[name] for name in ("consumed_tokens",) if name in newest.manifest},
            "model": model,
            "weights_only": True,
            "from": {"program": "megatron-davinci", "mean_of": _description(found, shares)},
        }
        checkpoint_files.commit(temporary, out, description, files.entries, latest=False)
    print(f"{out}: the mean of {len(found)} checkpoints")
    for one, share in zip(found, shares, strict=True):
        print(f"{share:8.2%}  {one.folder}")
    print("\nIn the configuration of a run that begins with it:\n")
    print(yaml.safe_dump({"checkpoint": {"initial_weights": str(out)}}, sort_keys=False))


def shares_of(how: str, count: int) -> list[float]:
    """What each of `count` checkpoints, older ones first, weighs in their mean; the sum is 1.

    Args:
        how: `equal`; `linear` for 1, 2, 3, …; a decay between 0 and 1, by which each weighs less than the next; or
            a number for each.
        count: Of checkpoints.

    Raises:
        ConfigError: It is none of these.
    """
    if how == "equal":
        return [1 / count] * count
    if how == "linear":
        raw = [float(n + 1) for n in range(count)]
    else:
        try:
            raw = [float(word) for word in how.split(",")]
        except ValueError:
            raw = []
        if len(raw) == 1 and 0 < raw[0] < 1:
            raw = [raw[0] ** (count - 1 - n) for n in range(count)]
        elif len(raw) != count:
            raise ConfigError(
                "The checkpoints' weights cannot be read.",
                where="--weights",
                found=how,
                expected=f"equal, linear, a number between 0 and 1, or {count} numbers with commas between",
            )
    total = math.fsum(raw)
    if not (math.isfinite(total) and total > 0 and min(raw) >= 0):
        raise ConfigError(
            "The checkpoints' weights give no mean.",
            where="--weights",
            found=how,
            expected="numbers that are finite and not negative, and not all of them 0",
        )
    return [one / total for one in raw]


def _all_of(names: list[str], last: int | None) -> list[Checkpoint]:
    """The checkpoints that are named, in the order of the names and, of one name, older ones first."""
    found: list[Checkpoint] = []
    for name in names:
        found += _of(name, last)
    if last is not None and not any(_is_a_run(name) for name in names):
        raise ConfigError(
            "No run is named whose newest checkpoints could be taken.",
            where="--last",
            found=" ".join(names),
            expected="a run's directory among them",
        )
    seen: dict[Path, Checkpoint] = {}
    for one in found:
        if seen.setdefault(one.folder.resolve(), one) is not one:
            raise ConfigError(
                "A checkpoint is named twice.",
                where=one.folder,
                do="name it once, and say with --weights what it weighs",
            )
    if len(found) < 2:
        raise ConfigError(
            "A mean is of two checkpoints or more.",
            where=", ".join(names),
            found=str(found[0].folder),
            do="name more, RUN@STEP,STEP, or --last N of a run",
        )
    return found


def _is_a_run(name: str) -> bool:
    return not (Path(name) / "state").is_dir() and "@" not in Path(name).name


def _of(name: str, last: int | None) -> list[Checkpoint]:
    """The checkpoints of one name."""
    from megatron_davinci.train import checkpoint_files

    if _is_a_run(name):
        if last is None:
            return [find(name).checkpoint]
        if last < 1:
            raise ConfigError("A mean is of checkpoints.", where="--last", found=last, expected="1 or more")
        folders = checkpoint_files.steps(Path(name) / "checkpoints")
        if len(folders) < last:
            raise CheckpointError(
                "The run has not so many checkpoints.",
                where=Path(name) / "checkpoints",
                found=", ".join(folder.name for folder in reversed(folders)) or "none",
                expected=f"{last}, as --last says",
                do="keep more of them (checkpoint.keep), or ask for fewer",
            )
        return [checkpoint_files.read(folder, verify=False) for folder in reversed(folders[:last])]
    folder, at, steps = name.rpartition("@")
    if not at or "," not in steps or (Path(name) / "state").is_dir():
        return [find(name).checkpoint]
    return [find(f"{folder}@{step.strip()}").checkpoint for step in steps.split(",")]


def _check_same_model(one: Checkpoint, other: Checkpoint) -> None:
    from megatron_davinci.train.same_model import differences

    found = differences(one.manifest["model"], other.manifest["model"])
    if found:
        raise CheckpointError(
            "The checkpoints are of different models, which have no mean.",
            where=one.folder,
            found="\n".join(f"model.{key}: {value!r}" for key, (value, _) in found.items()),
            expected="\n".join(f"model.{key}: {value!r}" for key, (_, value) in found.items())
            + f"\nas in {other.folder}",
            do="name checkpoints of one model",
        )


def _description(found: list[Checkpoint], shares: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "folder": str(one.folder.resolve()),
            "step": one.step,
            "consumed_samples": one.consumed_samples,
            "share": share,
        }
        for one, share in zip(found, shares, strict=True)
    ]
