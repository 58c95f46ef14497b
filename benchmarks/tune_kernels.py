"""Sizes that kernels are compiled with, tried on this machine's GPU: threads, shares of a block, runs, slots.

Every variant is the kernel's source with other numbers in it, compiled by NVRTC, and must give the same numbers as
the kernel as it is: to the bit, or where it adds them in another order within their rounding. Then it is timed as in
benchmarks/kernel_speed.py. What is best here may not be elsewhere: the defaults were measured on an H200.

On a machine without a GPU `--check` emulates what nvcc makes of variants, on few rows, and compares numbers alone.

Figures: for each op `OP_as_it_is_ms`, `OP_best_ms`, `OP_best_fraction_of_copy`; `variants`, `variants_that_differ`
(of their numbers). The peer's part has every variant's time by name.
"""

from __future__ import annotations

import os
import shutil
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
from megatron_davinci.kernels.adamw import adamw_, adamw_fp8_moments_  # noqa: E402
from megatron_davinci.kernels.cross_entropy import IGNORED  # noqa: E402
from megatron_davinci.platform import cuda_launch  # noqa: E402

Result = tuple[Tensor, ...]


@dataclass(frozen=True)
class Variant:
    """Other numbers in a source, and on the host.

    Attributes:
        texts: What is exchanged for what in the op's source.
        threads: Of a block, where they are others than the table's.
        slots: Likewise.
        resident: Blocks for each multiprocessor that are started at most, which then go on until all is done.
        cut: How rotary positions are cut, where it is another way than the op's.
        host: Other attributes of modules, and their values.
        beside: A header in `benchmarks/` that the texts include.
    """

    texts: tuple[tuple[str, str], ...] = ()
    threads: int | None = None
    slots: int | None = None
    resident: int | None = None
    cut: rope.Cut | None = None
    host: tuple[tuple[Any, str, int], ...] = ()
    beside: str | None = None

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
        if self.beside:
            shutil.copy(Path(__file__).parent / self.beside, folder)
        return folder

    def of(self, kernel: table.Kernel) -> table.Kernel:
        """The table's entry of a kernel, with it."""
        return replace(
            kernel,
            threads=self.threads or kernel.threads,
            slots=self.slots or kernel.slots,
            resident=self.resident or kernel.resident,
        )

    @contextmanager
    def on_the_host(self, kernel: str) -> Iterator[None]:
        """With a kernel's numbers in Python."""
        cut = {} if self.cut is None else {kernel: self.cut}
        with ExitStack() as stack:
            stack.enter_context(mock.patch.dict(table.KERNELS, {kernel: self.of(table.KERNELS[kernel])}))
            stack.enter_context(mock.patch.dict(rope.CUTS, cut))
            for module, name, value in self.host:
                stack.enter_context(mock.patch.object(module, name, value))
            yield


@dataclass(frozen=True)
class Op:
    """What is tried.

    Attributes:
        kernel: Its name in the table.
        make: Its inputs on a device, small or of the report's model: what runs it and returns what it computed, and
            the bytes that have to move.
        sums: Which of what it computes variants may round otherwise, from one on to the last; none: they give the
            same bits.
        slack: How far those may be from the op's, beside 2%.
        variants: By name.
    """

    kernel: str
    make: Callable[[torch.device, bool], tuple[Callable[[], Result], int]]
    sums: slice
    slack: float
    variants: dict[str, Variant]

    @property
    def source(self) -> str:
        """Its file."""
        return table.KERNELS[self.kernel].source


NO_SUMS = slice(0, 0)


def _rotated(
    device: torch.device, small: bool, back: bool, biased: bool = True
) -> tuple[Callable[[], Result], int]:
    speed = memory_bound_speed
    return rotated(device, *((37, 3) if small else (speed.SEQUENCE, speed.BATCH)), back, biased)


def rotated(
    device: torch.device, places: int, batch: int, back: bool, biased: bool = True
) -> tuple[Callable[[], Result], int]:
    """Rotary positions at the report's width or their gradient, with a bias or none, and the bytes that must move."""
    speed = memory_bound_speed
    heads = (speed.GROUPS, speed.QUERIES + 2, speed.QUERIES + 1)
    width = speed.GROUPS * heads[1] * speed.CHANNELS
    x = torch.randn(places, batch, width, device=device).bfloat16()
    bias = torch.randn(width, device=device).bfloat16() if biased else None
    angles = torch.outer(torch.arange(places), 1e6 ** -torch.linspace(0, 1, speed.CHANNELS // 2)).to(device)
    turns = rope.rotation_table(torch.cat([angles, angles], -1))
    out = x.clone()

    def forward() -> Result:
        rope.rotated_(out, bias, turns, None, *heads)
        return (out,)

    def backward() -> Result:
        return rope.backward(x, turns, None, *heads, biased)

    # In place without a bias, heads that do not turn stay where they are.
    moved = 2 * x.nbytes * (1 if back or biased else heads[2] / heads[1])
    return backward if back else forward, int(moved)


def _updated(device: torch.device, small: bool, coded: bool) -> tuple[Callable[[], Result], int]:
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
    copies = made(torch.bfloat16)
    if not coded:
        both = made(torch.float32), made(torch.float32)

        def full() -> Result:
            adamw_(parameters, gradients, *both, adamw_speed.UPDATE, copies)
            return (*parameters, *both[0], *both[1], *copies)

        return full, adamw_speed.FULL_BYTES * sum(counts)
    codes = made(torch.uint8), made(torch.uint8)
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
    for parts, blocks in ((5, 2), (1, 4)):  # that a multiprocessor has room for
        texts = (
            ("kPasses = 5", f"kPasses = {parts}"),
            ("false, false, 0, 2,", f"false, false, 0, {blocks},"),
        )
        for tokens in (8, 16, 32):
            cut = rope.Cut(parts, tokens, 8, 0)
            found[f"{parts} passes, {blocks} blocks, {tokens} tokens"] = Variant(texts, cut=cut)
    return found


def _rope_bias_variants() -> dict[str, Variant]:
    found = {}
    for parts, threads, blocks in ((1, 128, 8), (1, 256, 4), (5, 256, 2), (5, 128, 4)):
        texts = (
            (
                "kPassesOfBias = 1, kThreadsOfBias = 128",
                f"kPassesOfBias = {parts}, kThreadsOfBias = {threads}",
            ),
            ("false, true, 0, 8,", f"false, true, 0, {blocks},"),
        )
        for each in (1, 2, 3, 5):
            cut = rope.Cut(parts, each * threads // 32, threads // 32, 0)
            name = f"{parts} passes, {blocks} blocks of {threads} threads, {each} tokens a warp"
            found[name] = Variant(texts, threads, cut=cut)
    return found


def _rope_sums_variants() -> dict[str, Variant]:
    found = {}
    for threads, ahead in ((256, "kShares"), (256, "false"), (192, "kShares")):
        texts = (("kThreads = 256", f"kThreads = {threads}"), ("kAhead = kShares", f"kAhead = {ahead}"))
        what = "the next token" if ahead == "kShares" else "none"
        for sets in (128, 132):
            name = f"{threads} threads, {what} ahead, {sets} sets of tokens"
            found[name] = Variant(texts, threads, host=((rope, "_BLOCKS", sets),))
    # Small sums leave room for several blocks, of which one adds its warps' while others read.
    for threads, blocks in ((512, 2), (256, 4), (128, 8)):
        texts = (
            (
                "rope_sums, davinci::rope::kThreads, davinci::rope::kPasses, true, false, davinci::rope::kSlots, 1,",
                f"rope_sums, {threads}, 1, true, false, 4, {blocks},",
            ),
        )
        for sets in (64, 128, 256):
            name = f"a pass, {blocks} blocks of {threads} threads, {sets} sets of tokens"
            host = ((rope, "_BLOCKS", 5 * sets),)
            cut = rope.Cut(1, 8, 8, 132)
            found[name] = Variant(texts, threads, 4, 5 * sets, cut, host)
    return found


def _adamw_variants() -> dict[str, Variant]:
    found = {}
    for threads, blocks, together, powers in (
        (128, 4, "kThreads", (12, 13, 14)), (256, 2, "kThreads", (13, 14)), (512, 1, "kThreads", (14, 15)),
        (128, 4, "32", (10, 11, 12, 13)), (256, 2, "32", (10, 11, 12)), (512, 1, "32", (11, 12)),
    ):  # fmt: skip
        texts = (
            ("kThreads = 128;", f"kThreads = {threads};"),
            ("kTogether = kThreads;", f"kTogether = {together};"),
            ("kThreads, 4), eight_bits", f"kThreads, {blocks}), eight_bits"),
        )
        for power in powers:
            who = "warps" if together == "32" else "blocks"
            name = f"{blocks} blocks of {threads} threads, {who} draw runs of 2^{power}"
            host = ((spans, "ELEMENTS", 1 << power),)
            found[name] = Variant(texts, threads, resident=blocks, host=host)
    for threads, stages, powers in (
        (512, 2, (12,)),
        (512, 3, (11, 12)),
        (640, 2, (12,)),
        (640, 3, (11, 12, 13)),
    ):
        texts = (
            ("kThreads = 128;", f"kThreads = {threads};"),
            ("constexpr int kThreads", f"#define DAVINCI_STAGES {stages}\nconstexpr int kThreads"),
            ("  fill<kThreads>(powers);", ""),  # of the other way, which is for powers of two
            ("#define DAVINCI_ADAMW(", '#include "adamw_ahead.h"\n#define DAVINCI_ADAMW('),
            (
                "davinci::adamw::kThreads, 0, bounds",
                "davinci::adamw::kThreads, davinci::adamw::kSlots, bounds",
            ),
            ("kThreads, 4), eight_bits", "kThreads, 1), ahead"),
        )
        for power in powers:
            name = f"{stages} tiles of each of {threads // 32} warps in slots, runs of 2^{power}"
            host = ((spans, "ELEMENTS", 1 << power),)
            slots = 5 * stages + 1
            found[name] = Variant(texts, threads, slots, resident=1, host=host, beside="adamw_ahead.h")
    return found


def _adamw_full_variants() -> dict[str, Variant]:
    found = {}
    for threads, vectors, blocks in (
        (256, 2, 3), (1024, 2, 1), (512, 1, 2), (256, 4, 2), (128, 2, 6),
    ):  # fmt: skip
        texts = (
            ("kThreads = 128;", f"kThreads = {threads};"),
            ("kVectors = 2;", f"kVectors = {vectors};"),
            ("(davinci::adamw::kThreads, 6), full,", f"(davinci::adamw::kThreads, {blocks}), full,"),
        )
        found[f"{blocks} blocks of {threads} threads, {vectors} vectors each"] = Variant(texts, threads)
    return found


def _loss_variants() -> dict[str, Variant]:
    found = {}
    for threads, slots, group, behind, kept in (
        (1024, 14, 1, 4, 5), (1024, 14, 2, 2, 5), (1024, 14, 1, 2, 5), (1024, 14, 1, 6, 5), (768, 18, 2, 2, 7),
        (512, 28, 2, 3, 10),
    ):  # fmt: skip
        texts = (
            (
                "kWholeThreads = 1024, kSlots = 14, kAGroup = 1, kBehind = 4,",
                f"kWholeThreads = {threads}, kSlots = {slots}, kAGroup = {group}, kBehind = {behind},",
            ),
            ("kKept = 5;", f"kKept = {kept};"),
        )
        name = f"{threads} threads, {slots} slots, groups of {group}, {behind} behind, {kept} kept"
        found[name] = Variant(texts, threads, slots)
    return found


OPS = {
    "rope": Op("rope", lambda d, s: _rotated(d, s, False, False), NO_SUMS, 0.0, _rope_variants()),
    "rope_bias": Op("rope_bias", lambda d, s: _rotated(d, s, False), NO_SUMS, 0.0, _rope_bias_variants()),
    "rope_backward": Op(
        "rope_sums", lambda d, s: _rotated(d, s, True), slice(-1, None), 0.1, _rope_sums_variants()
    ),
    "adamw": Op("adamw", lambda d, s: _updated(d, s, False), NO_SUMS, 0.0, _adamw_full_variants()),
    "adamw_fp8": Op("adamw_fp8_moments", lambda d, s: _updated(d, s, True), NO_SUMS, 0.0, _adamw_variants()),
    "cross_entropy": Op("cross_entropy_whole", _lost, slice(None), 1e-6, _loss_variants()),
}


class Tried(ways.Way):
    """The kernels of a variant on a GPU."""

    name = "run_time"

    def __init__(self, code: bytes) -> None:
        super().__init__("a variant")
        self._module = nvrtc.Module(code)

    def launch(self, name: str, blocks: int, of: Tensor, *arguments: Tensor | int | float) -> None:
        """As `Way.launch`."""
        kernel = table.KERNELS[name]
        if kernel.source == "column_sums.cu":
            AS_IT_IS[of.device].launch(name, blocks, of, *arguments)
            return
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


def same(found: Result, known: Result, op: Op) -> bool:
    """Whether numbers are the same: to the bit, but for those that are sums, or follow from them."""
    pairs = list(zip(found, known, strict=True))
    rounded = pairs[op.sums]
    return all(torch.equal(a, b) for a, b in pairs[: len(pairs) - len(rounded)]) and all(
        torch.allclose(a.float(), b.float(), rtol=2e-2, atol=op.slack) for a, b in rounded
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
            kernels = [variant.of(one) if one.name == op.kernel else one for one in table.KERNELS.values()]
            built = ptx_emulator.build(op.source, where=folder, kernels=kernels)
            return ways.Ptx(
                "a variant", lambda name: built if name == op.source else ptx_emulator.build(name)
            )

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            ways_of = dict(
                zip(sources_of, pool.map(made, range(len(sources_of)), sources_of.values()), strict=True)
            )
        for name, variant in op.variants.items():
            with ways.using(ways_of[variant.texts]), variant.on_the_host(op.kernel):
                found[name] = same(computed(op, device, seed, True)[1], known, op)
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
        with ways.using(Tried(codes[variant.texts])), variant.on_the_host(op.kernel):
            action, found, _ = computed(op, device, seed, False)
            equal[name] = same(found, known, op)
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
