"""Process groups: torch.distributed and Megatron-Core's model-parallel groups, started and stopped."""

from __future__ import annotations

import logging
import os
import re
import socket
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_davinci.errors import DavinciError, EnvironmentProblem, LostPeer
from megatron_davinci.platform.device import Platform
from megatron_davinci.platform.rendezvous import meet

# Said by torch and Megatron-Core at run time about each other; nothing that a user could act on.
_KNOWN_WARNINGS = (
    r".*CUDA_DEVICE_MAX_CONNECTIONS.*",
    r".*cuda_graph_scope.*",
    r".*the core_attn is from transformer_engine and may be the fused version.*",
    r".*The \.grad attribute of a Tensor that is not a leaf.*",
    r".*all_gather_into_tensor.*|.*reduce_scatter_tensor.*|.*_all_gather_base.*|.*_reduce_scatter_base.*",
    r".*ShardedTensor.*|.*TypedStorage is deprecated.*",
    r".*torch\.distributed\._sharded_tensor.*|.*torch\.distributed\._shard.*",
    r".*No device id is provided via `init_process_group`.*|.*barrier\(\): using the device under.*",
)


def start(
    platform: Platform,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int = 1,
    context: int = 1,
    expert: int = 1,
    expert_tensor: int = 1,
    optimizer_instances: int = 1,
    timeout_seconds: float = 600.0,
    seed: int = 1234,
    joined: Callable[[], None] | None = None,
) -> None:
    """Join the other ranks and lay out the model-parallel groups.

    Rank, world size and address come from the environment, as torchrun sets them; without them this is a
    world of one.

    Args:
        platform: What to compute on.
        tensor: Tensor-parallel size.
        pipeline: Pipeline-parallel size.
        virtual_pipeline: Model chunks of each pipeline rank.
        context: Context-parallel size.
        expert: Expert-parallel size.
        expert_tensor: Tensor-parallel size of experts.
        optimizer_instances: Groups of data-parallel ranks that shard the optimizer's state among themselves.
        timeout_seconds: How long a collective may wait for a rank.
        seed: Seeds dropout and initialisation; each tensor- and pipeline-parallel rank gets its own stream.
        joined: Called once all ranks are there, before groups are laid out: for what must agree before that.

    Raises:
        EnvironmentProblem: The other ranks did not come, or could not be reached, in time.
    """
    from megatron.core import parallel_state

    for text in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=text)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("RANK", "0")
        os.environ.setdefault("WORLD_SIZE", "1")
        # Without a launcher there is one rank, whose store takes whatever port is free.
        os.environ.setdefault("MASTER_PORT", "0")
        timeout = timedelta(seconds=timeout_seconds)
        store = meet(timeout)
        try:
            dist.init_process_group(
                platform.backend,
                store=store,
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                timeout=timeout,
            )
        except (RuntimeError, ValueError, dist.DistError) as error:
            raise EnvironmentProblem(
                "This rank could not connect to the others.",
                where=f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {socket.gethostname()}",
                found=error,
                do="every rank came to the rendezvous: check that the nodes reach each other on the interface of "
                "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME",
            ) from error
    if joined is not None:
        joined()
    parallel_state.initialize_model_parallel(
        tensor,
        pipeline,
        virtual_pipeline if virtual_pipeline > 1 else None,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
        num_distributed_optimizer_instances=optimizer_instances,
        distributed_timeout_minutes=max(1, round(timeout_seconds / 60)),
    )
    seed_ranks(seed)


def seed_ranks(seed: int, *, cuda_graphs: bool = False) -> None:
    """Seed every generator: each tensor- and pipeline-parallel rank gets its own stream, data-parallel ones share.

    Args:
        seed: Any integer; it is folded into 32 bits.
        cuda_graphs: Whether generators are of the kind that CUDA graphs can capture.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    seed = (seed + 100 * parallel_state.get_pipeline_model_parallel_rank()) % 2**31
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True, use_cudagraphable_rng=cuda_graphs)


def stop() -> None:
    """Leave the groups. Safe to call twice, and when `start` failed."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def lost_peer(error: BaseException) -> LostPeer | None:
    """What a rank says when a collective failed because another rank has gone.

    Args:
        error: What the collective raised. torch has a class for NCCL's errors; gloo's are known by their text alone.

    Returns:
        The error to say; None when `error` is of another kind.
    """
    gloo = isinstance(error, RuntimeError) and "gloo/transport/" in str(error)
    if not gloo and not isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return None
    # "[.../gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:59577. This is typically ..."
    return _lost(re.sub(r"^\[[^\]]*\] ", "", str(error).splitlines()[0]).partition(" This is typically")[0])


def _lost(said: str) -> LostPeer:
    return LostPeer(
        "This rank lost another one, and cannot go on without it.",
        where=f"rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')} on {socket.gethostname()}",
        found=said,
        do="look at what the other ranks have said, for one of them ended first; start the run again, and it goes on "
        "from its newest checkpoint",
    )


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Give every rank the `value` of rank `source`."""
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def on_rank_zero(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0; every rank gets its result, or the error that it raised.

    So no rank waits for an answer that does not come. Without process groups this process is rank 0.

    Raises:
        LostPeer: On the other ranks, where rank 0 raised what is no error for a user to mend: it raises that itself.
    """
    if not dist.is_initialized():
        return action()
    outcome: tuple[bool, Any] = (True, None)
    bug: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome = (True, action())
        except DavinciError as error:
            outcome = (False, error)
        except OSError as error:
            problem = EnvironmentProblem("A file system error.", where=error.filename, found=error.strerror)
            outcome = (False, problem)
        except Exception as error:
            # It may not be one that another process can read.
            bug, outcome = error, (False, f"{type(error).__name__} on rank 0")
    good, value = broadcast_object(outcome)
    if bug is not None:
        raise bug
    if not good:
        raise value if isinstance(value, DavinciError) else _lost(value)
    return value


def gather_objects(value: Any) -> list[Any]:
    """The `value` of every rank, by rank, on every rank."""
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def largest(values: Sequence[int]) -> list[int]:
    """The largest of each number over all ranks: one collective of 8 bytes a number, cheap enough for every step."""
    on_gpu = dist.get_backend() == "nccl"
    box = torch.tensor(values, dtype=torch.int64, device=torch.cuda.current_device() if on_gpu else "cpu")
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return [int(value) for value in box.tolist()]


def shared_store() -> dist.Store:
    """The store that the ranks met in. Keys of one attempt to run are not seen by the next."""
    store: dist.Store = dist.distributed_c10d._get_default_store()
    return store
