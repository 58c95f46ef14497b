"""Sizes that kernels are compiled with, tried on this machine's GPU: threads, shares of a block, runs, slots.

Every variant is the kernel's source with other numbers in it, compiled by NVRTC, and must give the same numbers as
the kernel as it is: to the bit, or for sums over tokens within their rounding. Then it is timed as in
benchmarks/kernel_speed.py. What is best here may not be elsewhere: the defaults were measured on an H200.

On a machine without a GPU `--check` emulates what nvcc makes of variants, on few rows, and compares numbers alone.

Figures: for each op `OP_as_it_is_ms`, `OP_best_ms`, `OP_best_fraction_of_copy`; `variants`, `variants_that_differ`
(of their numbers). The peer's part has every variant's time by name.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import adamw_speed, common, kernel_speed, memory_bound_speed  # noqa: E402
from megatron_davinci.errors import EnvironmentProblem  # noqa: E402
from megatron_davinci.kernels import cross_entropy_passes as passes  # noqa: E402
from megatron_davinci.kernels import moments, nvrtc, ptx_emulator, rope, sources, spans, table, ways  # noqa: E402
from megatron_davinci.kernels.adamw import adamw_fp8_moments_  # noqa: E402
from megatron_davinci.kernels.cross_entropy import IGNORED  # noqa: E402
from megatron_davinci.platform import cuda_launch  # noqa: E402

Result = tuple[Tensor, ...]


@dataclass(frozen=True)
class Variant:
    """Other numbers in a source, and on the host.

    Attributes:
        texts: What is exchanged for what in the op's source.
        threads: Of a block, where they are others than the table's.
        slots: Likewise, of kernels that have any.
        resident: Blocks for each multiprocessor that are started at most, which then go on until all is done.
        host: Attributes of modules, and their values.
    """

    texts: tuple[tuple[str, str], ...] = ()
    threads: int | None = None
    slots: int | None = None
    resident: int | None = None
    host: tuple[tuple[Any, str, int], ...] = ()

    def written(self, source: str, folder: Path) -> Path:
        """The sources with it, in a folder.

        Raises:
            ValueError: A text is not there: the list is older than the sources.
        """
        for name, text in sources.files(None).items():
            for old, new in self.texts if name == source else ():
                if old not in text:
                    raise ValueError(f"{source} has no {old!r}")
                text = text.replace(old, new, 1)
            (folder / name).write_text(text)
        return folder

    @contextmanager
    def on_the_host(self) -> Iterator[None]:
        """With its numbers in Python."""
        with ExitStack() as stack:
            for module, name, value in self.host:
                stack.enter_context(mock.patch.object(module, name, value))
            yield


@dataclass(frozen=True)
class Op:
    """What is tried.

    Attributes:
        source: Its file.
        make: Its inputs on a device, small or of the report's model: what runs it and returns what it computed, and
            the bytes that have to move.
        exact: Whether variants give the same bits; or all but the last tensor, which is sums over tokens.
        variants: By name.
    """

    source: str
    make: Callable[[torch.device, bool], tuple[Callable[[], Result], int]]
    exact: bool
    variants: dict[str, Variant]


def _rotated(device: torch.device, small: bool, back: bool) -> tuple[Callable[[], Result], int]:
    speed = memory_bound_speed
    return rotated(device, *((37, 3) if small else (speed.SEQUENCE, speed.BATCH)), back)


def rotated(device: torch.device, places: int, batch: int, back: bool) -> tuple[Callable[[], Result], int]:
    """Rotary positions with a bias at the report's width, or their gradient; and the bytes that have to move."""
    speed = memory_bound_speed
    heads = (speed.GROUPS, speed.QUERIES + 2, speed.QUERIES + 1)
    width = speed.GROUPS * heads[1] * speed.CHANNELS
    x = torch.randn(places, batch, width, device=device).bfloat16()
    bias = torch.randn(width, device=device).bfloat16()
    angles = torch.outer(torch.arange(places), 1e6 ** -torch.linspace(0, 1, speed.CHANNELS // 2)).to(device)
    turns = rope.rotation_table(torch.cat([angles, angles], -1))
    out = x.clone()

    def forward() -> Result:
        rope.rotated_(out, bias, turns, None, *heads)
        return (out,)

    def backward() -> Result:
        return rope.backward(x, turns, None, *heads, True)

    return backward if back else forward, 2 * x.nbytes


def _updated(device: torch.device, small: bool) -> tuple[Callable[[], Result], int]:
    counts = [40_000, 17, 128 * 300] if small else adamw_speed.sizes()

    def made(dtype: torch.dtype, size: float = 0.0) -> list[Tensor]:
        # One buffer, as Megatron-Core's distributed optimizer has for each.
        places = [0]
        for n in counts:
            places.append(places[-1] + -(-n // 128) * 128)
        whole = torch.zeros(places[-1], dtype=dtype, device=device)
        if size:
            whole.normal_(std=size)
        return [whole[at : at + n] for at, n in zip(places, counts)]

    parameters, gradients = made(torch.float32, 0.02), made(torch.float32, 1e-3)
    codes, copies = (made(torch.uint8), made(torch.uint8)), made(torch.bfloat16)
    ranges = [torch.zeros(moments.groups(n), 4, device=device) for n in counts]

    def action() -> Result:
        adamw_fp8_moments_(parameters, gradients, *codes, ranges, adamw_speed.UPDATE, copies)
        return (*parameters, *codes[0], *codes[1], *ranges, *copies)

    return action, int(adamw_speed.CODED_BYTES * sum(counts))


def _lost(device: torch.device, small: bool) -> tuple[Callable[[], Result], int]:
    rows, columns = 4 if small else kernel_speed.ALL_ROWS, kernel_speed.VOCABULARY
    logits = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    labels = torch.randint(columns, (rows,), device=device)
    return lambda: (*passes.whole_(logits, labels, columns, IGNORED), logits), 2 * logits.nbytes


def _rope_variants() -> dict[str, Variant]:
    found = {}
    for threads, blocks in ((128, 4), (256, 2), (512, 1)):  # that a multiprocessor has room for
        texts = (
            ("kThreads = 256", f"kThreads = {threads}"),
            ("DAVINCI_ROPE(rope, false, 0, 2, bf16", f"DAVINCI_ROPE(rope, false, 0, {blocks}, bf16"),
        )
        for tokens in (threads // 16, threads // 8, 3 * threads // 16, threads // 4, threads // 2):
            host = ((rope, "_TOKENS", tokens), (rope, "_LEAST", 0))
            found[f"{threads} threads, {blocks} blocks, {tokens} tokens"] = Variant(texts, threads, host=host)
    return found


def _rope_sums_variants() -> dict[str, Variant]:
    found = {}
    of_registers = (
        (256, 5),
        (256, 3),
        (256, 2),
        (384, 3),
        (384, 2),
        (512, 2),
        (512, 1),
    )  # as far as they reach
    for threads, at_once in of_registers:
        texts = (("kThreads = 256", f"kThreads = {threads}"), ("kPasses = 5", f"kPasses = {at_once}"))
        chunks = -(-5 // at_once)
        for blocks in (132,) if chunks == 1 else (132, 132 * chunks):
            host = ((rope, "_PASSES", at_once), (rope, "_BLOCKS", blocks))
            found[f"{threads} threads, {at_once} passes, {blocks // chunks} parts"] = Variant(
                texts, threads, host=host
            )
    return found


def _adamw_variants() -> dict[str, Variant]:
    found = {}
    declared, many = "(davinci::adamw::kThreads, 2), eight_bits", 1 << 20
    for threads, resident, how in (
        (128, 4, "go on"), (256, 2, "go on"), (512, 1, "go on"), (256, many, "take a run each"),
    ):  # fmt: skip
        room = 2 if resident == many else resident
        texts = (
            ("kThreads = 256", f"kThreads = {threads}"),
            (declared, f"(davinci::adamw::kThreads, {room}), eight_bits"),
        )
        for power in (12, 13, 14, 15):
            name = f"{room} blocks of {threads} threads that {how}, runs of 2^{power}"
            host = ((spans, "ELEMENTS", 1 << power),)
            found[name] = Variant(texts, threads, resident=resident, host=host)
    found["a turn at once"] = Variant((("#pragma unroll 2\n", "#pragma unroll 1\n"),))
    return found


OPS = {
    "rope": Op("rope.cu", lambda d, s: _rotated(d, s, False), True, _rope_variants()),
    "rope_backward": Op("rope.cu", lambda d, s: _rotated(d, s, True), False, _rope_sums_variants()),
    "adamw_fp8": Op(
        "adamw.cu",
        _updated,
        True,
        _adamw_variants(),
    ),
    "cross_entropy": Op(
        "cross_entropy.cu",
        _lost,
        True,
        {
            f"{slots} slots, groups of {group}, {behind} behind, {kept} kept": Variant(
                (
                    (
                        "kWholeThreads = 512, kSlots = 28, kAGroup = 2, kBehind = 2, kKept = 10, kBatch = 2",
                        f"kWholeThreads = 512, kSlots = {slots}, kAGroup = {group}, kBehind = {behind}, "
                        f"kKept = {kept}, kBatch = 2",
                    ),
                ),
                slots=slots,
            )
            for slots, group, behind, kept in (
                (28, 2, 2, 8), (28, 2, 3, 10), (28, 2, 1, 10), (28, 4, 1, 10), (28, 4, 2, 10), (28, 1, 4, 10),
                (26, 2, 2, 12), (24, 2, 2, 10), (24, 4, 2, 12), (28, 2, 4, 6),
            )
        },
    ),
}  # fmt: skip


def as_varied(kernel: table.Kernel, variant: Variant) -> table.Kernel:
    """The table's entry of a kernel whose source a variant is of."""
    return replace(
        kernel,
        threads=variant.threads or kernel.threads,
        slots=variant.slots or kernel.slots if kernel.slots else 0,
        resident=variant.resident or kernel.resident,
    )


class Tried(ways.Way):
    """The kernels of a variant on a GPU."""

    name = "run_time"

    def __init__(self, variant: Variant, code: bytes) -> None:
        super().__init__("a variant")
        self._variant, self._module = variant, nvrtc.Module(code)

    def launch(self, name: str, blocks: int, of: Tensor, *arguments: Tensor | int | float) -> None:
        """As `Way.launch`."""
        kernel = table.KERNELS[name]
        if kernel.source == "column_sums.cu":
            AS_IT_IS[of.device].launch(name, blocks, of, *arguments)
            return
        kernel = as_varied(kernel, self._variant)
        with cuda_launch.on(of.device):
            blocks = ways._limited(blocks, kernel, of.device, self.most_blocks)
            stream = cuda_launch.current_stream(of.device)
            self._module.launch(kernel, ways.SUFFIXES[of.dtype], blocks, ways._addresses(arguments), stream)


AS_IT_IS: dict[torch.device, ways.Way] = {}
"""The way that ops have without this script, by device."""


def computed(
    op: Op, device: torch.device, seed: int, small: bool
) -> tuple[Callable[[], Result], Result, int]:
    """Fresh inputs, and what the op makes of them once."""
    torch.manual_seed(seed)
    action, moved = op.make(device, small)
    return action, tuple(one.clone() for one in action()), moved


def same(found: Result, known: Result, exact: bool) -> bool:
    """Whether numbers are the same: to the bit, but for sums over tokens, which come last."""
    pairs = list(zip(found, known, strict=True))
    sums = [] if exact else [pairs.pop()]
    return all(torch.equal(a, b) for a, b in pairs) and all(
        torch.allclose(a.float(), b.float(), rtol=2e-2, atol=1e-1) for a, b in sums
    )


def checked(op: Op, seed: int) -> dict[str, bool]:
    """Which variants, as nvcc makes them and emulated, give the same numbers as the op as it is."""
    device = torch.device("cpu")
    found: dict[str, bool] = {}
    sources_of = {variant.texts: variant for variant in op.variants.values()}
    with ways.emulating("ptx"), tempfile.TemporaryDirectory() as scratch:
        known = computed(op, device, seed, True)[1]

        def made(number: int, variant: Variant) -> ways.Way:
            folder = Path(scratch) / str(number)
            folder.mkdir()
            variant.written(op.source, folder)
            kernels = [as_varied(kernel, variant) for kernel in table.KERNELS.values()]
            built = ptx_emulator.build(op.source, where=folder, kernels=kernels)
            return ways.Ptx(
                "a variant", lambda name: built if name == op.source else ptx_emulator.build(name)
            )

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            ways_of = dict(
                zip(sources_of, pool.map(made, range(len(sources_of)), sources_of.values()), strict=True)
            )
        for name, variant in op.variants.items():
            with ways.using(ways_of[variant.texts]), variant.on_the_host():
                found[name] = same(computed(op, device, seed, True)[1], known, op.exact)
    return found


def compiled(op: Op, compiler: nvrtc.Compiler, capability: int) -> dict[object, bytes]:
    """Each source that variants have, by its texts, several at once."""

    def code(variant: Variant) -> bytes:
        with tempfile.TemporaryDirectory() as scratch:
            return compiler.compile(op.source, capability, variant.written(op.source, Path(scratch)))

    sources_of = {variant.texts: variant for variant in op.variants.values()}
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(sources_of, pool.map(code, sources_of.values()), strict=True))


def timed(op: Op, seed: int, copy: float) -> tuple[dict[str, float], dict[str, bool], int]:
    """Milliseconds by variant, which gave the same numbers, and the bytes that have to move."""
    device = torch.device("cuda", torch.cuda.current_device())
    compiler = nvrtc.find_compiler()
    if compiler is None:
        raise EnvironmentProblem(
            "Variants are compiled by NVRTC, which was not found.",
            where="benchmarks/tune_kernels.py",
            do="install a CUDA build of torch: it brings NVRTC along",
        )
    AS_IT_IS[device] = ways.way_for(device)
    codes = compiled(op, compiler, cuda_launch.capability(device))
    action, known, moved = computed(op, device, seed, False)
    times, equal = {"as it is": 1e3 * kernel_speed.seconds(action)}, {}
    for name, variant in op.variants.items():
        del action
        torch.cuda.empty_cache()
        with ways.using(Tried(variant, codes[variant.texts])), variant.on_the_host():
            action, found, _ = computed(op, device, seed, False)
            equal[name] = same(found, known, op.exact)
            del found
            times[name] = 1e3 * kernel_speed.seconds(action)
        print(
            f"{name:<50} {times[name]:8.4f} ms, {moved / times[name] / 1e-3 / copy:.3f} of a copy", flush=True
        )
    return times, equal, moved


def main() -> int:
    """Check or time, and write."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--check", action="store_true", help="emulate variants on a CPU, and time nothing")
    parser.add_argument("--ops", nargs="+", choices=sorted(OPS), default=list(OPS))
    arguments = parser.parse_args()
    if not arguments.check and not torch.cuda.is_available():
        raise EnvironmentProblem(
            "Speed is measured on a GPU, and torch finds none.",
            where="benchmarks/tune_kernels.py",
            do="give --check to compare the numbers of variants by emulation",
        )
    figures: dict[str, float] = {"variants": 0, "variants_that_differ": 0}
    peer: dict[str, Any] = {}
    copy = 0.0 if arguments.check else kernel_speed.bandwidth(torch.device("cuda"))
    for name in arguments.ops:
        op = OPS[name]
        if arguments.check:
            equal = checked(op, arguments.seed)
        else:
            times, equal, moved = timed(op, arguments.seed, copy)
            best = min(times, key=lambda one: times[one] if equal.get(one, True) else float("inf"))
            figures |= {
                f"{name}_as_it_is_ms": times["as it is"],
                f"{name}_best_ms": times[best],
                f"{name}_best_fraction_of_copy": moved / times[best] / 1e-3 / copy,
            }
            peer[name] = {"best": best, "ms": times}
            print(f"{name}: {best} is the fastest", flush=True)
        figures["variants"] += len(equal)
        figures["variants_that_differ"] += sum(not one for one in equal.values())
        for one in (one for one, is_same in equal.items() if not is_same):
            print(f"{name}: {one} gives other numbers", flush=True)
    common.write(arguments.json, figures, peer)
    return 1 if figures["variants_that_differ"] else 0


if __name__ == "__main__":
    sys.exit(main())
