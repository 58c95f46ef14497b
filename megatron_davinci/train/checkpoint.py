"""Saving and restoring a run's state through Megatron-Core's `dist_checkpointing`, on every rank together."""

from __future__ import annotations

import queue
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from megatron_davinci.errors import CheckpointError, DavinciError, EnvironmentProblem
from megatron_davinci.files import disk_errors, free_bytes
from megatron_davinci.platform.distributed import broadcast_object
from megatron_davinci.train import checkpoint_files
from megatron_davinci.train.checkpoint_files import Checkpoint

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


class _WriteHere(TorchDistSaveShardedStrategy):
    """Megatron-Core's `torch_dist` writer, in this process and with digests of what is written.

    Megatron-Core forks a process for each file and collects results through a manager process; a rank that is
    killed leaves them behind. A save that the trainer waits for anyway needs neither.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)
        self.failure: Exception | None = None

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        request = super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)
        if writer.write_buckets:
            transforms = [writer.transforms] if hasattr(writer, "transforms") else []
            return request._replace(async_fn=self._write, async_fn_args=(transforms, writer), preload_fn=None)
        return request

    def _write(self, transforms: list[Any], writer: Any) -> None:
        results: dict[int, Any] = {}
        for index, bucket in enumerate(writer.preload_tensors(writer.write_buckets, non_blocking=False)):
            done: queue.Queue[Any] = queue.Queue()
            running: queue.Queue[Any] = queue.Queue()
            running.put(index)
            files: list[checkpoint_files.DigestFile] = []

            def opened(
                name: str, mode: str, files: list[checkpoint_files.DigestFile] = files
            ) -> checkpoint_files.DigestFile:
                files.append(checkpoint_files.DigestFile(name, mode))
                return files[-1]

            # The function opens its file by the module's global name `open`.
            filesystem_async.open = opened
            try:
                writer.write_preloaded_data(transforms, index, bucket, done, running, True)
            finally:
                del filesystem_async.open
            _, outcome = done.get()
            if isinstance(outcome, Exception):
                self.failure = next((file.failure for file in files if file.failure), outcome)
                break
            results[index] = outcome
        writer.results_queue.put(self.failure or results)


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
    return {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=loading, metadata=dict(CONTENT)),
    }


def _key(number: int) -> str:
    return f"chunk{number}"


def save(
    checkpoints: Path, chunks: Sequence[Any], optimizer: Any, description: dict[str, Any], *, keep: int
) -> Checkpoint:
    """Save a checkpoint; every rank calls this.

    Args:
        checkpoints: The run's folder of checkpoints.
        chunks: The model chunks, not wrapped.
        optimizer: Megatron-Core's optimizer.
        description: Manifest fields; `step`, `consumed_samples` and `model` are needed.
        keep: How many of the newest checkpoints stay.

    Returns:
        The visible checkpoint, on every rank.

    Raises:
        EnvironmentProblem: There is no space, or the file system failed; older checkpoints are whole.
    """
    step = int(description["step"])
    _need_space(checkpoints, chunks)
    temporary = _rank_zero(lambda: checkpoint_files.begin(checkpoints, step))
    strategy = _WriteHere()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            dist_checkpointing.save(
                sharded_state(chunks, optimizer),
                str(temporary / "state"),
                sharded_strategy=strategy,
                content_metadata=dict(CONTENT),
            )
    except BaseException as error:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        cause = error
        if isinstance(error, CheckpointException):
            # Every rank raises it; the one that failed knows why.
            failures: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(failures, strategy.failure)
            cause = next((failure for failure in failures if failure is not None), error)
        with disk_errors(checkpoints, f"saving the checkpoint of step {step}"):
            raise cause from error
    target = checkpoint_files.step_folder(checkpoints, step)
    saved: Checkpoint = _rank_zero(lambda: checkpoint_files.commit(temporary, target, description))
    if dist.get_rank() == 0:
        checkpoint_files.prune(checkpoints, keep, newest=step)
    return saved


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
    checkpoint: Checkpoint = _rank_zero(lambda: checkpoint_files.read(folder))
    check_same_model(checkpoint, model)
    # States of FP8 layers are no weights; they begin anew.
    weights = {
        _key(n): {
            name: one
            for name, one in chunk.sharded_state_dict(metadata=CONTENT).items()
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


def find(checkpoints: Path) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest good checkpoint on rank 0 and tell every rank.

    Returns:
        The checkpoint or None, and a line for each newer one that was passed over.

    Raises:
        CheckpointError: There are checkpoints and none is good. To begin anew would bury what may be mended.
    """

    def search() -> tuple[Checkpoint | None, list[str]]:
        found, problems = checkpoint_files.newest_good(checkpoints)
        if found is None and problems:
            raise CheckpointError(
                "The run has checkpoints, and none of them is whole.",
                where=checkpoints,
                found="\n".join(str(problem) for problem in problems[:3]),
                do="restore one of them, or begin anew with another run.directory",
            )
        return found, [str(problem) for problem in problems]

    return _rank_zero(search)


def check_same_model(
    checkpoint: Checkpoint, model: dict[str, Any], distributed_optimizer: bool | None = None
) -> None:
    """Refuse a checkpoint of another model.

    Args:
        checkpoint: What would be loaded.
        model: The `model` section of this run, resolved.
        distributed_optimizer: Whether this run shards the optimizer; None if its state is not wanted.

    Raises:
        CheckpointError: A size or switch of the model differs; every one is listed.
    """
    ignored = {"preset", "init_std", "dropout"}
    # A switch that is younger than the checkpoint was off.
    saved = {"qk_norm": False, **checkpoint.manifest["model"]}
    differing = [
        f"model.{key}: {saved.get(key)!r} in the checkpoint, {value!r} in this run"
        for key, value in model.items()
        if key not in ignored and saved.get(key) != value
    ]
    stored = checkpoint.manifest.get("distributed_optimizer", distributed_optimizer)
    if distributed_optimizer is not None and stored != distributed_optimizer:
        differing.append(
            f"parallel.distributed_optimizer: {not distributed_optimizer} in the checkpoint, "
            f"{distributed_optimizer} in this run (their optimizer states are stored differently)"
        )
    if differing:
        raise CheckpointError(
            "The checkpoint is of another model.",
            where=checkpoint.folder,
            found="\n".join(differing),
            do="resume with the configuration that wrote it, or give this run another run.directory",
        )


def _need_space(checkpoints: Path, chunks: Sequence[Any]) -> None:
    """Refuse before anything is written when the checkpoint cannot fit."""
    weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
    # Weights, and in fp32 the main weights and both moments. Data- and context-parallel ranks hold the same ones.
    local = sum(weight.numel() * (weight.element_size() + 12) for weight in weights)
    total = torch.tensor(
        local if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0 else 0,
        dtype=torch.int64,
        device=weights[0].device,
    )
    dist.all_reduce(total)

    def check() -> None:
        free = free_bytes(checkpoints)
        if free < int(total):
            raise EnvironmentProblem(
                "There is no space for a checkpoint.",
                where=checkpoints,
                found=f"{free / 1e9:.3g} GB free",
                expected=f"about {int(total) / 1e9:.3g} GB",
                do="free space or set run.directory to another disk, then start the same command again: "
                "the run goes on from its newest checkpoint",
            )

    _rank_zero(check)


def _rank_zero(action: Any) -> Any:
    """Run `action` on rank 0; every rank gets its result, or the error that it raised."""
    outcome: tuple[bool, Any] = (True, None)
    if dist.get_rank() == 0:
        try:
            outcome = (True, action())
        except DavinciError as error:
            outcome = (False, error)
        except OSError as error:
            problem = EnvironmentProblem("A file system error.", where=error.filename, found=error.strerror)
            outcome = (False, problem)
    good, value = broadcast_object(outcome)
    if not good:
        raise value
    return value
