"""Every change that we make to Megatron-Core 0.16, in one list: which symbol, where it matters, and why.

`import_hook` applies the patches of a module right after that module has run. `scope` says where a patch holds:
`cpu` only where Megatron-Core runs without CUDA, `all` everywhere. tests/platform/test_megatron_patches.py
fails when the installed Megatron-Core no longer has a symbol that is named here, so that a new minor version
is taken on purpose and not by accident.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

SUPPORTED = "0.16"
"""The minor version of Megatron-Core that the patches below were written against."""


@dataclass(frozen=True)
class Patch:
    """One changed symbol.

    Attributes:
        module: The Megatron-Core module that owns the symbol.
        symbol: The dotted name inside the module.
        why: What goes wrong without the patch.
        apply: Makes the change; called with the freshly loaded module.
        scope: `cpu` or `all`.
        new: The symbol does not exist without Transformer Engine, and the patch supplies it.
    """

    module: str
    symbol: str
    why: str
    apply: Callable[[Any], None]
    scope: Literal["cpu", "all"] = "cpu"
    new: bool = False


def _rng_state_functions(module: Any) -> None:
    import torch

    module._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _rng_fork(module: Any) -> None:
    import torch

    @contextlib.contextmanager
    def fork(self: Any, name: str = module._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        if name not in self.states_:
            raise KeyError(f"random state {name} was never added to the tracker")
        outside, outside_name = torch.get_rng_state(), self._current_state_name
        if outside_name != "default-rng":
            self.states_[outside_name] = outside
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)
            self._current_state_name = outside_name

    module.CudaRNGStatesTracker.fork = fork


def _fp8_state_stubs(module: Any) -> None:
    if module.HAVE_TE:
        return
    module.FP8GlobalStateManager = types.SimpleNamespace(is_fp8_enabled=lambda: False)
    module.activation_recompute_forward = lambda **_: contextlib.nullcontext()
    module.fp8_autocast = lambda **_: contextlib.nullcontext()


def _no_compile(module: Any) -> None:
    module.jit_fuser = module.noop_decorator


def _no_general_gemm(module: Any) -> None:
    if not module.HAVE_TE:
        module.te_general_gemm = None


def _weight_gradients_without_apex(module: Any) -> None:
    from megatron_davinci.platform.weight_gradient import add_weight_gradient

    if module._grad_accum_fusion_available:
        return
    module.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=add_weight_gradient)
    module._grad_accum_fusion_available = True


def _norm_in_one_read(module: Any) -> None:
    import torch

    if module.l2_norm_impl.__module__ != "megatron.core.utils":
        return

    def l2_norm(chunk_size: int, noop_flag: Any, tensor_lists: Any, per_tensor: bool, *args: Any) -> Any:
        norms = torch.stack([torch.linalg.vector_norm(one).to(noop_flag.device) for one in tensor_lists[0]])
        return torch.linalg.vector_norm(norms).reshape(1), None

    module.l2_norm_impl = l2_norm


def _move_to_cpu_as_numpy(module: Any) -> None:
    original = module.maybe_move_tensor_to_cpu

    @functools.wraps(original)
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = original(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and hasattr(moved, "numpy") else moved

    module.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _unequal_parts(module: Any) -> None:
    import torch

    gather, scatter = module._gather_along_first_dim, module._reduce_scatter_along_first_dim

    def gather_along_first_dim(
        input_: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, None, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
        padded[: len(input_)] = input_
        parts = gather(padded, group).split(max(sizes)) if max(sizes) else [padded] * len(sizes)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def reduce_scatter_along_first_dim(
        input_: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, None, use_global_buffer)
        whole = input_.clone()
        torch.distributed.all_reduce(whole, group=group)
        return whole.split([int(size) for size in input_split_sizes])[group.rank()].contiguous()

    module._gather_along_first_dim = gather_along_first_dim
    module._reduce_scatter_along_first_dim = reduce_scatter_along_first_dim


def _plain_results_queue(module: Any) -> None:
    module._get_write_results_queue = queue.Queue


def _one_rearrangement(module: Any) -> None:
    if module.HAVE_EINOPS:
        return

    def rearrange(ranks: Any, pattern: str, *, u: int, s: int, l: int) -> Any:  # noqa: E741
        if pattern != "(l s u) -> (l u) s":
            raise NotImplementedError(f"only Megatron-Core's rearrangement of ranks, not {pattern}")
        return ranks.reshape(l, s, u).transpose(0, 2, 1).reshape(l * u, s)

    module.einops = types.SimpleNamespace(rearrange=rearrange)
    module.HAVE_EINOPS = True


def _buckets_without_gaps(module: Any) -> None:
    original = module._ParamAndGradBuffer.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        for bucket in self.buckets[:-1]:
            bucket.numel_unpadded = bucket.grad_data.numel()
        self.numel_unpadded = sum(bucket.numel_unpadded for bucket in self.buckets)

    module._ParamAndGradBuffer.__init__ = __init__


def _buffers_not_reused(module: Any) -> None:
    module.TensorReusePool.insert = lambda self, tensor: None


def _safe_reader(module: Any) -> None:
    from megatron_davinci.platform.checkpoint_metadata import SafeReader

    module.FileSystemReader = SafeReader


def _safe_cached_reader(module: Any) -> None:
    from megatron_davinci.platform.checkpoint_metadata import SafeReader

    def read_metadata(self: Any) -> Any:
        if self._cached_metadata is None:
            self._cached_metadata = SafeReader.read_metadata(self)
        return self._cached_metadata

    module.CachedMetadataFileSystemReader.read_metadata = read_metadata


def _safe_bytes(module: Any) -> None:
    from megatron_davinci.platform.checkpoint_metadata import load_bytes

    module.MCoreLoadPlanner.load_bytes = load_bytes


PATCHES: tuple[Patch, ...] = (
    Patch(
        "megatron.core.jit",
        "jit_fuser",
        "torch.compile at decoration imports the inductor (about 2 s) and compiles fusions that stay off on a CPU",
        _no_compile,
    ),
    Patch(
        "megatron.core.tensor_parallel.random",
        "_get_cuda_rng_state",
        "reads the generator of a CUDA device",
        _rng_state_functions,
    ),
    Patch(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        "writes the generator of a CUDA device (applied with _get_cuda_rng_state)",
        lambda module: None,
    ),
    Patch(
        "megatron.core.tensor_parallel.random",
        "CudaRNGStatesTracker.fork",
        "warns that the CPU generator changed inside the fork; on a CPU that is the generator that it forks",
        _rng_fork,
    ),
    Patch(
        "megatron.core.tensor_parallel.random",
        "FP8GlobalStateManager",
        "CheckpointWithoutOutput asks Transformer Engine for it even with fp8=False: a NameError without TE",
        _fp8_state_stubs,
        new=True,
    ),
    Patch(
        "megatron.core.tensor_parallel.mappings",
        "_gather_along_first_dim",
        "gathers parts of unequal sizes, which experts on several tensor ranks have; gloo's are of one size",
        _unequal_parts,
    ),
    Patch(
        "megatron.core.tensor_parallel.mappings",
        "_reduce_scatter_along_first_dim",
        "scatters parts of unequal sizes (applied with _gather_along_first_dim)",
        lambda module: None,
    ),
    Patch(
        "megatron.core.tensor_parallel.layers",
        "_grad_accum_fusion_available",
        "adds weight gradients to fp32 sums in their products by an extension of apex only, and refuses without it; "
        "torch's own product does the same",
        _weight_gradients_without_apex,
        scope="all",
    ),
    Patch(
        "megatron.core.optimizer.clip_grads",
        "l2_norm_impl",
        "without Transformer Engine and apex it waits for a GPU once for each tensor of the gradient",
        _norm_in_one_read,
        scope="all",
    ),
    Patch(
        "megatron.core.transformer.moe.moe_utils",
        "te_general_gemm",
        "the router's matrix product compares Transformer Engine's with None: a NameError without TE",
        _no_general_gemm,
        scope="all",
        new=True,
    ),
    Patch(
        "megatron.core.transformer.moe.moe_utils",
        "maybe_move_tensor_to_cpu",
        "turns counts of tokens into numpy only when they were on a GPU; all-to-all takes no tensors for sizes",
        _move_to_cpu_as_numpy,
    ),
    Patch(
        "megatron.core.parallel_state",
        "HAVE_EINOPS",
        "the groups of several distributed optimizers want einops, which Megatron-Core does not require, for one "
        "rearrangement of a list of ranks",
        _one_rearrangement,
        scope="all",
    ),
    Patch(
        "megatron.core.distributed.param_and_grad_buffer",
        "_ParamAndGradBuffer.__init__",
        "a checkpoint's optimizer state is silently wrong when a bucket before the last ends in padding: the "
        "buckets are laid end to end without their padding (distrib_optimizer.py:1113) and cut at offsets that "
        "count it (:1499). Tied embeddings with PP, or a model of more than one bucket, are enough. Counting "
        "the padding of all buckets but the last as theirs makes both agree",
        _buckets_without_gaps,
        scope="all",
    ),
    Patch(
        "megatron.core.transformer.cuda_graphs",
        "TensorReusePool.insert",
        "a layer's input goes back to the pool as its forward graph is captured, and the next backward graph of that "
        "shape takes it for an output's gradient: the input that the layer's own backward pass wants is overwritten",
        _buffers_not_reused,
        scope="all",
    ),
    Patch(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "_get_write_results_queue",
        "starts a multiprocessing manager in a spawned process: 4 s at the first save, and left behind when a rank "
        "is killed. Our checkpoint writer writes in the rank's own process and needs no more than a queue",
        _plain_results_queue,
        scope="all",
    ),
    Patch(
        "megatron.core.dist_checkpointing.strategies.torch",
        "FileSystemReader",
        "unpickles a checkpoint's .metadata, which could run any program. Ours names the classes that may be in it",
        _safe_reader,
        scope="all",
    ),
    Patch(
        "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
        "CachedMetadataFileSystemReader.read_metadata",
        "unpickles a checkpoint's .metadata likewise",
        _safe_cached_reader,
        scope="all",
    ),
    Patch(
        "megatron.core.dist_checkpointing.strategies.torch",
        "MCoreLoadPlanner",
        "its load_bytes is torch's, which unpickles what is stored as bytes (states of FP8 layers) whole",
        _safe_bytes,
        scope="all",
    ),
)


def patch_tensor_methods() -> None:
    """Let `Tensor.type()` and `Tensor.cuda()` answer Megatron-Core, and only it, as if tensors were on CUDA.

    Megatron-Core compares `tensor.type()` with `torch.cuda.*Tensor` to tell dtypes apart, and calls `.cuda()`
    on freshly made tensors. Any other caller gets torch's own answer.
    """
    import torch

    original_type, original_cuda = torch.Tensor.type, torch.Tensor.cuda

    def asked_by_megatron() -> bool:
        caller = sys._getframe(2).f_globals.get("__name__", "")
        return caller.startswith("megatron.core")

    def type_(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        if args or kwargs or not asked_by_megatron() or "cuda" in answer:
            return answer
        return answer.replace("torch.", "torch.cuda.", 1)

    def cuda_(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self if asked_by_megatron() else original_cuda(self, *args, **kwargs)

    torch.Tensor.type = type_  # type: ignore[method-assign]
    torch.Tensor.cuda = cuda_  # type: ignore[method-assign]


def use_adam(adam: type, *, transformer_engine: bool = False) -> None:
    """Make Megatron-Core build `adam`, whatever FusedAdam it has found itself.

    Megatron-Core's distributed optimizer is written for an Adam that keeps `step` in the parameter group. With
    a plain torch AdamW (no TE, no Apex) it resumes silently wrong: one step tensor is shared by every parameter
    and counted up once for each (distrib_optimizer.py:818 of 0.16.1), a fresh optimizer cannot be the target of
    a load (:642), and `fully_reshardable` fails on the missing key (:939).

    Args:
        adam: The optimizer's class, which keeps FusedAdam's contract.
        transformer_engine: Whether it is Transformer Engine's.
    """
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam = distrib_optimizer.Adam = adam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = transformer_engine
    distrib_optimizer.USING_APEX_OPTIMIZER = not transformer_engine
