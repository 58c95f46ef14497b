"""A run's state as Megatron-Core's `dist_checkpointing` sees it, and how it is found and loaded on every rank."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from megatron_davinci.errors import CheckpointError
from megatron_davinci.model.precision_state import low_precision_of
from megatron_davinci.platform.distributed import on_rank_zero
from megatron_davinci.train import checkpoint_files
from megatron_davinci.train.checkpoint_files import Checkpoint, TurnedBack
from megatron_davinci.train.same_model import differences

# `fully_reshardable` is the one layout of the optimizer's state that loads on any TP, PP and DP; Megatron-Core's
# own default raises when it saves.
# Only one data-parallel rank writes it, so only that one gathers it (`mem_efficient`).
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


_DOES_NOT_FIT = (
    dist_checkpointing.core.CheckpointingException,
    CheckpointException,
    KeyError,
    RuntimeError,
    ValueError,
)


def sharded_state(chunks: Sequence[Any], optimizer: Any, *, loading: bool = False) -> dict[str, Any]:
    """Describe this rank's part of the state.

    Tensors are stored under their names in the whole model, layers counted over all chunks. So nothing in the files
    depends on how the model was cut.

    Args:
        chunks: The model chunks, not wrapped.
        optimizer: Megatron-Core's optimizer.
        loading: Whether it is to be filled from a checkpoint.
    """
    # Copies: Megatron-Core adds the process groups of this layout to them.
    weights = {_key(n): chunk.sharded_state_dict(metadata=dict(CONTENT)) for n, chunk in enumerate(chunks)}
    with _old_objects_aside():
        moments = optimizer.sharded_state_dict(weights, is_loading=loading, metadata=dict(CONTENT))
    state = {"model": weights, "optimizer": moments}
    low = low_precision_of(chunks)
    scales = {} if low is None else low.sharded_state()
    return {**state, "low_precision": scales} if scales else state


@contextmanager
def _old_objects_aside() -> Iterator[None]:
    """Have the garbage collector pass over the objects that are there.

    Megatron-Core's distributed optimizer collects garbage whenever its state is asked for. To go through every object
    of the process took a third of a second, six times as long as all else that training waits for in a save of a
    small model; to move them aside and back takes no time.
    """
    if gc.get_freeze_count():
        yield  # somebody has set objects aside for good
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _key(number: int) -> str:
    return f"chunk{number}"


def load(checkpoint: Checkpoint, chunks: Sequence[Any], optimizer: Any) -> None:
    """Fill model and optimizer from a checkpoint of any layout; every rank calls this.

    Raises:
        CheckpointError: The state does not fit the model.
    """
    state = sharded_state(chunks, optimizer, loading=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            loaded = dist_checkpointing.load(state, str(checkpoint.state))
        for number, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded["model"][_key(number)])
        if (low := low_precision_of(chunks)) is not None:
            low.load(loaded.get("low_precision", {}))
        # Megatron-Core copies into parameters that require gradients here without saying no_grad.
        with torch.no_grad():
            optimizer.load_state_dict(loaded["optimizer"])
    except _DOES_NOT_FIT as error:
        raise CheckpointError(
            "The checkpoint's state does not fit this model.",
            where=checkpoint.folder,
            found=f"{type(error).__name__}: {error}",
            do="resume with the configuration that wrote it; its run directory has config.yaml",
        ) from error


def load_weights(folder: Path, chunks: Sequence[Any], model: dict[str, Any]) -> Checkpoint:
    """Fill a model from the weights of a checkpoint of any layout, and nothing else from it; every rank calls this.

    Args:
        folder: The checkpoint's folder.
        chunks: The model chunks, not wrapped, before an optimizer has copied their parameters.
        model: The `model` section of this run, resolved.

    Raises:
        CheckpointError: It is damaged, or of another model.
    """
    checkpoint: Checkpoint = on_rank_zero(lambda: checkpoint_files.read(folder))
    check_same_model(checkpoint, model)
    # States of FP8 layers are no weights; they begin anew.
    weights = {
        _key(n): {
            name: one
            for name, one in chunk.sharded_state_dict(metadata=dict(CONTENT)).items()
            if not isinstance(one, ShardedObject)
        }
        for n, chunk in enumerate(chunks)
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            loaded = dist_checkpointing.load({"model": weights}, str(checkpoint.state))
        for number, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded["model"][_key(number)], strict=False)
    except _DOES_NOT_FIT as error:
        raise CheckpointError(
            "The weights that this run is to begin with do not fit its model.",
            where=folder,
            found=f"{type(error).__name__}: {error}",
            do="make the checkpoint again, or choose another for checkpoint.initial_weights",
        ) from error
    return checkpoint


def find(
    checkpoints: Path, turned_back: Callable[[Checkpoint], str | None] = lambda checkpoint: None
) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest good checkpoint on rank 0 and tell every rank.

    Newer ones that are damaged are renamed, so that their steps can be saved anew and somebody can look at them.

    Args:
        checkpoints: The run's folder of checkpoints.
        turned_back: As in `checkpoint_files.newest_good`.

    Returns:
        The checkpoint or None, and a line for each newer one that was passed over.

    Raises:
        CheckpointError: There are checkpoints and none is good. To begin anew would bury what may be mended.
    """

    def search() -> tuple[Checkpoint | None, list[str]]:
        for folder in (checkpoints.parent, checkpoints):
            checkpoint_files.check_owner(folder)
        found, problems = checkpoint_files.newest_good(checkpoints, turned_back)
        damaged = [one for one in problems if not isinstance(one, TurnedBack)]
        if found is None and damaged:
            raise CheckpointError(
                "The run has checkpoints, and none of them is whole.",
                where=checkpoints,
                found="\n".join(str(problem) for problem in damaged[:3]),
                do="restore one of them, or begin anew with another run.directory",
            )
        newer = checkpoint_files.steps(checkpoints)[: len(problems)]  # newest first, as problems are
        said = []
        for folder, problem in zip(newer, problems, strict=True):
            why = "turned-back" if isinstance(problem, TurnedBack) else "damaged"
            aside = checkpoint_files.set_aside(folder, why)
            said.append(f"{problem}" + (f"\n  renamed:  {aside}" if aside else ""))
        return found, said

    return on_rank_zero(search)


def check_same_model(
    checkpoint: Checkpoint,
    model: dict[str, Any],
    distributed_optimizer: bool | None = None,
    optimizer: str | None = None,
) -> None:
    """Refuse a checkpoint of another model.

    Args:
        checkpoint: What would be loaded.
        model: The `model` section of this run, resolved.
        distributed_optimizer: Whether this run shards the optimizer; None if its state is not wanted.
        optimizer: Its kind; likewise.

    Raises:
        CheckpointError: A size or switch of the model differs; every one is listed.
    """
    differing = [
        f"model.{key}: {saved!r} in the checkpoint, {value!r} in this run"
        for key, (saved, value) in differences(checkpoint.manifest["model"], model).items()
    ]
    stored = checkpoint.manifest.get("distributed_optimizer", distributed_optimizer)
    # Muon's state is stored by parameters, wherever they lie.
    if optimizer != "muon" and distributed_optimizer is not None and stored != distributed_optimizer:
        differing.append(
            f"parallel.distributed_optimizer: {not distributed_optimizer} in the checkpoint, "
            f"{distributed_optimizer} in this run (their optimizer states are stored differently)"
        )
    kind = checkpoint.manifest.get("optimizer", "adamw")
    if optimizer is not None and kind != optimizer:
        differing.append(f"optimizer.kind: {kind} in the checkpoint, {optimizer} in this run")
    if differing:
        raise CheckpointError(
            "The checkpoint is of another model.",
            where=checkpoint.folder,
            found="\n".join(differing),
            do="resume with the configuration that wrote it, or give this run another run.directory",
        )


def check_same_recipe(checkpoint: Checkpoint, low: dict[str, Any]) -> None:
    """Refuse a checkpoint that was trained with other products of few bits.

    Args:
        checkpoint: What would be loaded.
        low: What decides those of this run.

    Raises:
        CheckpointError: They differ; every difference is listed.
    """
    saved = checkpoint.manifest.get("low_precision", {"recipe": "none"})
    names = dict.fromkeys([*saved, *low])
    differing = [
        f"train.low_precision, {name}: {saved.get(name)!r} in the checkpoint, {low.get(name)!r} in this run"
        for name in names
        if saved.get(name) != low.get(name)
    ]
    if differing:
        raise CheckpointError(
            "The checkpoint was trained by another recipe.",
            where=checkpoint.folder,
            found="\n".join(differing),
            do="resume with the recipe that wrote it; for another, begin a new run from its weights "
            "(checkpoint.initial_weights), or end this one in train.precision by train.low_precision.tail_tokens",
        )
