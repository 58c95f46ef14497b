"""What we change in Megatron-Core is still there to be changed, reaches it alone, and is all that it needs.

Most of this reads Megatron-Core's source without importing it, so that a new version says what moved before
anything runs on it.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from megatron_davinci.platform import megatron_patches
from megatron_davinci.platform.cpu_torch import _CUDA, _FACTORIES
from megatron_davinci.platform.megatron_patches import PATCHES, SUPPORTED
from tests.ranks import run_ranks

# Parts of Megatron-Core that come along with an import and that we do not run without CUDA.
NOT_RUN = (
    "megatron.core.inference",
    "megatron.core.distributed.fsdp",
    "megatron.core.transformer.cuda_graphs",
    "megatron.core.full_cuda_graph",
    "megatron.core.nccl_allocator",
    "megatron.core.resharding",
    "megatron.core.energy_monitor",
)

# What the rest asks of `torch.cuda` beyond the stand-in's names, and why that is never reached, or right as it is.
ASKED_AND_FINE = {
    "is_available": "answers False, which is true",
    "nvtx": "profiler ranges, off unless asked for",
    "default_generators": "the CUDA-graph-safe RNG tracker, which is not chosen",
    "CUDAGraph": "whether the class can register a generator: asked before anything is captured",
    "random": "the type of a generator state that only CUDA graphs make",
    "device": "a context around the generator of a CUDA device, in a function that a patch replaces",
    "amp": "decorators of functions that take CUDA tensors; torch's own do nothing here",
    "OutOfMemoryError": "an exception's class, caught",
    "FloatTensor": "compared with what Tensor.type() answers",
    "HalfTensor": "compared with what Tensor.type() answers",
    "BFloat16Tensor": "compared with what Tensor.type() answers",
    "get_device_properties": "fused kernels ask for the number of multiprocessors",
    "temperature": "the straggler detector, off",
    "power_draw": "the straggler detector, off",
    "utilization": "the straggler detector, off",
    "clock_rate": "the straggler detector, off",
}

# Methods and not factories of torch: they go with the tensor that they are called on.
DEVICE_METHODS = {"to", "new_empty", "new_zeros", "new_ones"}


def source_path(module: str) -> Path:
    """Where a Megatron-Core module lies, found without importing anything of it."""
    # `megatron` is a namespace package: finding it runs no code.
    roots = importlib.util.find_spec("megatron").submodule_search_locations
    relative = Path(*module.split(".")[1:])
    for root in roots:
        for candidate in (Path(root) / relative.with_suffix(".py"), Path(root) / relative / "__init__.py"):
            if candidate.exists():
                return candidate
    raise AssertionError(f"Megatron-Core has no module {module}")


def definitions(body: Iterable[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Every name that a module's statements define, with methods as `Class.method`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (prefix + (alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            for field in ("body", "orelse", "finalbody", "handlers"):
                for child in getattr(node, field, []):
                    children = child.body if isinstance(child, ast.ExceptHandler) else [child]
                    yield from definitions(children, prefix)


def missing(patches: Iterable[megatron_patches.Patch]) -> list[str]:
    """Symbols that the installed source does not define (for `new` ones: does not use)."""
    gone = []
    for patch in patches:
        tree = ast.parse(source_path(patch.module).read_text())
        if patch.new:
            known = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        else:
            known = set(definitions(tree.body))
        if patch.symbol not in known:
            gone.append(f"{patch.module}:{patch.symbol}")
    return gone


def test_the_installed_version_is_the_one_that_the_patches_are_for():
    version = importlib.metadata.version("megatron-core")
    assert version.startswith(SUPPORTED + "."), (
        f"megatron-core {version}: go through PATCHES, then raise SUPPORTED"
    )


def test_every_patched_symbol_is_where_it_was():
    assert missing(PATCHES) == []


def test_a_symbol_that_moved_would_be_noticed():
    moved = [
        megatron_patches.Patch(patch.module, patch.symbol + "_moved", "", lambda module: None, new=patch.new)
        for patch in PATCHES
    ]
    assert len(missing(moved)) == len(PATCHES)


def test_every_patch_says_why_and_no_symbol_is_patched_twice():
    assert all(len(patch.why) > 20 for patch in PATCHES)
    symbols = [(patch.module, patch.symbol) for patch in PATCHES]
    assert len(set(symbols)) == len(symbols)


def test_what_a_patch_supplies_comes_from_transformer_engine_alone():
    for patch in PATCHES:
        if not patch.new:
            continue
        tree = ast.parse(source_path(patch.module).read_text())
        guarded = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Try)
            and any(name == patch.symbol for name in definitions(node.body))
            and any(isinstance(handler.type, ast.Name | ast.Tuple) for handler in node.handlers)
        ]
        assert guarded, f"{patch.symbol} is no longer an optional import of {patch.module}"
        assert "HAVE_TE" in set(definitions(tree.body))


def test_the_optimizers_names_that_use_adam_binds_are_there():
    for module, names in {
        "megatron.core.optimizer": {"Adam", "USING_PYTORCH_OPTIMIZER"},
        "megatron.core.optimizer.distrib_optimizer": {"Adam", "HAVE_APEX_OR_TE", "USING_APEX_OPTIMIZER"},
    }.items():
        assert names <= set(definitions(ast.parse(source_path(module).read_text()).body)), module


def test_the_checkpoint_writers_hooks_are_there():
    # train.checkpoint takes the place of these methods.
    tree = ast.parse(source_path("megatron.core.dist_checkpointing.strategies.torch").read_text())
    assert "TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks" in set(definitions(tree.body))
    tree = ast.parse(source_path("megatron.core.dist_checkpointing.strategies.filesystem_async").read_text())
    names = set(definitions(tree.body))
    assert {
        "FileSystemWriterAsync.preload_tensors",
        "FileSystemWriterAsync.write_preloaded_data",
        "_get_write_results_queue",
    } <= names


def loaded_modules() -> list[str]:
    return sorted(
        name
        for name, module in sys.modules.items()
        if name.startswith("megatron.core.") and module is not None
    )


def cuda_uses(tree: ast.AST) -> tuple[set[str], set[str]]:
    """The attributes of `torch.cuda` that code asks for, and the callees that are given a CUDA device."""
    attributes, callees = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
            attributes.add(node.attr)
        if isinstance(node, ast.ImportFrom) and node.module == "torch.cuda":
            attributes.update(alias.name for alias in node.names if not alias.name.startswith("_"))
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                device = ast.unparse(keyword.value) if keyword.arg == "device" else ""
                if "cuda" in device:
                    callees.add(ast.unparse(node.func))
    return attributes, callees


@pytest.fixture(scope="module")
def uses() -> tuple[set[str], set[str]]:
    attributes, callees = set(), set()
    for name in run_ranks(1, loaded_modules)[0]:
        if not name.startswith(NOT_RUN):
            found = cuda_uses(ast.parse(source_path(name).read_text()))
            attributes |= found[0]
            callees |= found[1]
    return attributes, callees


def test_the_stand_in_covers_what_megatron_core_asks_of_cuda(uses):
    attributes, _ = uses
    assert len(attributes) > 10, "the scan found something"
    new = attributes - set(_CUDA) - set(ASKED_AND_FINE)
    assert not new, (
        "not used by the version that the stand-in was written for: look whether a CPU run reaches it"
    )


def test_the_stand_in_covers_nothing_that_is_gone(uses):
    attributes, _ = uses
    assert set(ASKED_AND_FINE) <= attributes
    assert set(_CUDA) <= attributes, "drop it from the stand-in"


def test_every_tensor_that_is_made_on_a_cuda_device_is_made_by_a_factory_of_the_stand_in(uses):
    _, callees = uses
    factories = {f"torch.{name}" for name in _FACTORIES}
    assert "torch.zeros" in callees
    other = {callee for callee in callees - factories if callee.rsplit(".", 1)[-1] not in DEVICE_METHODS}
    # Streams are the stand-in's own, and symmetric memory is NVLink's.
    assert other == {"torch.cuda.Stream", "symm_mem.empty"}


def test_the_scan_sees_a_new_use():
    attributes, callees = cuda_uses(
        ast.parse(
            "torch.cuda.brand_new()\nx = torch.linspace(0, 1, device='cuda')\nfrom torch.cuda import graphs"
        )
    )
    assert attributes == {"brand_new", "graphs"}
    assert callees == {"torch.linspace"}


def where_the_stand_in_is() -> dict[str, list[str]]:
    import torch

    from megatron_davinci.platform.cpu_torch import STAND_IN

    found: dict[str, list[str]] = {"stand_in": [], "torch": []}
    for name, module in list(sys.modules.items()):
        bound = module.__dict__.get("torch") if isinstance(module, types.ModuleType) else None
        if bound is STAND_IN:
            found["stand_in"].append(name)
        elif bound is torch and name.startswith("megatron.core"):
            found["torch"].append(name)
    return found


def test_only_megatron_core_sees_the_stand_in_and_all_of_it_does():
    found = run_ranks(1, where_the_stand_in_is)[0]
    assert len(found["stand_in"]) > 50
    assert [name for name in found["stand_in"] if not name.startswith("megatron.core")] == []
    assert found["torch"] == []


CALLS = """
def kind(x): return x.type()
def cast(x, dtype): return x.type(dtype)
def move(x): return x.cuda()
"""


def tensor_answers() -> dict[str, object]:
    import torch

    answers: dict[str, object] = {}
    for caller in ("megatron.core.somewhere", "some.other.program"):
        module: dict = {"__name__": caller}
        exec(CALLS, module)
        x = torch.ones(2, dtype=torch.bfloat16)
        answers[f"{caller} type"] = module["kind"](x)
        answers[f"{caller} cast"] = str(module["cast"](x, torch.int32).dtype)
        try:
            answers[f"{caller} cuda"] = module["move"](x) is x
        except (AssertionError, RuntimeError) as error:
            answers[f"{caller} cuda"] = type(error).__name__
    return answers


def test_tensors_answer_everyone_else_as_torch_does():
    import torch

    if torch.cuda.is_available():
        pytest.skip("nothing is patched where CUDA is")
    answers = run_ranks(1, tensor_answers)[0]
    assert answers["megatron.core.somewhere type"] == "torch.cuda.BFloat16Tensor"
    assert answers["megatron.core.somewhere cuda"] is True
    assert answers["some.other.program type"] == "torch.BFloat16Tensor"
    assert answers["some.other.program cuda"] in ("AssertionError", "RuntimeError"), "torch has no CUDA here"
    assert {answers[f"{name} cast"] for name in ("megatron.core.somewhere", "some.other.program")} == {
        "torch.int32"
    }


def random_streams() -> list[list[float]]:
    """What the patched tracker draws: inside a fork, outside, inside again, and inside another stream's."""
    import torch
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    torch.manual_seed(3)
    drawn = []
    for name in ("a", None, "a", "b", None):
        if name is None:
            drawn.append(torch.rand(2).tolist())
        else:
            with tracker.fork(name):
                drawn.append(torch.rand(2).tolist())
    try:
        with tracker.fork("none"):
            pass
    except KeyError:
        drawn.append([])
    return drawn


def test_random_streams_are_apart_and_go_on_where_they_were():
    import torch

    def draw(seed, count):
        return torch.rand(2 * count, generator=torch.Generator().manual_seed(seed)).reshape(count, 2).tolist()

    a, b, outside = draw(1, 2), draw(2, 1), draw(3, 2)
    assert run_ranks(1, random_streams)[0] == [a[0], outside[0], a[1], b[0], outside[1], []]


def norms_of_a_gradient():
    """Megatron-Core's, ours, and how often ours reads a number from the device."""
    import torch
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            read.append(func) if "_local_scalar_dense" in str(func) else None
            return func(*args, **kwargs or {})

    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(size, generator=generator) * scale for size, scale in ((7, 1e-3), (3000, 1), (1, 40))
    ]
    read: list = []
    arguments = (torch.zeros(1, dtype=torch.int), [tensors], False)
    theirs, _ = utils.local_multi_tensor_applier(utils.local_multi_tensor_l2_norm, *arguments)
    with Reads():
        ours, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, *arguments)
    return theirs.tolist(), ours.tolist(), len(read)


def test_the_gradients_norm_is_the_same_and_is_not_read_by_tensor():
    ((theirs, ours, read),) = run_ranks(1, norms_of_a_gradient)
    assert ours == theirs and ours[0] > 40 and read == 0
