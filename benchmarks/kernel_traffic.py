"""What kernels ask of memory and how much they compute, at the widths of the report's model, without a GPU.

What nvcc makes of them for compute capability 9.0, in PTX, is emulated on few rows, and every access noted. Figures:

- `OP_traffic`: bytes of the sectors (of 32 bytes) that warps' requests touch, over the bytes that have to move: 1
  where requests are coalesced and nothing is asked for twice;
- `OP_memory`: the same of different sectors, each counted once: what comes from memory if caches keep all else;
- `OP_bytes_a_request`: of a warp, on average; 512 where every lane asks for 16;
- `OP_bank_turns`: turns that the banks of shared memory take, over those without conflicts;
- `OP_instructions`: of PTX, for each number that the op computes, those apart that a register's renaming makes away
  with; the machine's own are fewer or more;
- `OP_special`: of them powers, logarithms, inverses and roots, of which a multiprocessor approximates 16 a clock,
  where it does 128 others. Where they are rounded (as in AdamW with fp32 moments) one of PTX is several of the
  machine's.

The sum over sets of rows at the end of a weight's or bias's gradient, a kernel of its own, is left out. With
`--lines` each op's source lines follow which most instructions come from, and those whose requests are not coalesced
or conflict.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import adamw_speed, common, kernel_speed, memory_bound_speed, tune_kernels  # noqa: E402
from megatron_davinci.kernels import cross_entropy_passes as passes  # noqa: E402
from megatron_davinci.kernels import moments, ptx_emulator, rms_norm, rope, swiglu, ways  # noqa: E402
from megatron_davinci.kernels.adamw import adamw_, adamw_fp8_moments_  # noqa: E402
from megatron_davinci.kernels.cross_entropy import IGNORED  # noqa: E402
from megatron_davinci.kernels.made import Gated, GatedGradient, Matrix, written  # noqa: E402
from megatron_davinci.kernels.quantize import amax_of, quantize  # noqa: E402

RENAMED = ("mov.", "cvta.", "ld.param.", "ret", "bra.uni")
SPECIAL = ("ex2.", "lg2.", "rcp.", "sqrt.", "div.rn.")  # a rounded one begins with one that is not
SECTOR = 32


@dataclass
class Line:
    """A source line: what its instructions did."""

    instructions: int = 0
    special: int = 0
    requests: int = 0
    asked: int = 0  # bytes
    sectors: int = 0
    turns: int = 0
    least_turns: int = 0


@dataclass
class Noted:
    """What some launches did: by source line, and sectors that were read and written at all."""

    lines: dict[tuple[str, int], Line] = field(default_factory=dict)
    read: int = 0
    written: int = 0

    def sum(self, name: str) -> int:
        """Over all lines."""
        return sum(getattr(line, name) for line in self.lines.values())


_traced = partial(ptx_emulator.build, trace=True)


class Traced(ways.Ptx):
    """Emulates and notes."""

    def __init__(self, build: Callable[[str], ptx_emulator.Built] = _traced) -> None:
        self.built: list[ptx_emulator.Built] = []
        super().__init__("traced", lambda source: self._noting(build(source)))

    def _noting(self, built: ptx_emulator.Built) -> ptx_emulator.Built:
        self.built.append(built)
        return built

    def take(self) -> Noted:
        """What was done since it was taken last."""
        noted = Noted()
        for built in self.built:
            places, blocks = built.translated.places, built.translated.blocks
            ran, touched = np.zeros(len(blocks), np.uint64), np.zeros((len(places), 4), np.uint64)
            sectors = np.zeros(2, np.uint64)  # read, written
            pointers = [ctypes.c_void_p(one.ctypes.data) for one in (ran, touched, sectors)]
            ctypes.CDLL(str(built.path)).davinci_trace_take(*pointers)
            if built.kernels[0].name == "column_sums":
                continue  # as large for any number of rows: on few it would be most of what is done
            for times, block in zip(ran.tolist(), blocks, strict=True):
                for (file, line, name), count in block.items():
                    if times and not name.startswith(RENAMED):
                        at = noted.lines.setdefault((file, line), Line())
                        at.instructions += times * count
                        at.special += times * count * name.startswith(SPECIAL)
            for (file, line, name), did in zip(places, touched.tolist(), strict=True):
                requests, asked, parts, least = did
                if not requests:
                    continue
                at = noted.lines.setdefault((file, line), Line())
                if ".shared" in name and "global" not in name:
                    at.turns += parts
                    at.least_turns += least
                else:
                    at.requests += requests
                    at.asked += asked
                    at.sectors += parts
            noted.read += int(sectors[0])
            noted.written += int(sectors[1])
        return noted


@dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        run: It, once its inputs are there.
        moved: Bytes that have to move.
        numbers: That are computed.
    """

    run: Callable[[], object]
    moved: float
    numbers: int


def _in_sets(module: Any, name: str, action: Callable[[], object]) -> Callable[[], object]:
    """Rows or tokens in three sets, which have about as many each as those of 16,384 on a GPU."""

    def run() -> None:
        with mock.patch.object(module, name, 3):
            action()

    return run


def _bf16(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def cross_entropy() -> Case:
    """Six rows of logits: two for each of the emulator's blocks."""
    logits = _bf16(6, kernel_speed.VOCABULARY)
    labels = torch.randint(kernel_speed.VOCABULARY, (6,))
    run = partial(passes.whole_, logits, labels, kernel_speed.VOCABULARY, IGNORED)
    return Case(run, 2 * logits.nbytes, logits.numel())


def add_rms_norm(back: bool) -> Case:
    """96 rows; with the residual, and backward with its gradient."""
    x, residual, by_normal, by_total = (_bf16(96, memory_bound_speed.HIDDEN) for _ in range(4))
    weight, eps = _bf16(memory_bound_speed.HIDDEN), memory_bound_speed.EPS
    with ways.using("reference"):
        _, total, scale = rms_norm.forward(x, residual, weight, eps)
    backward = partial(rms_norm.backward, by_normal, by_total, total, weight, scale)
    forward = partial(rms_norm.forward, x, residual, weight, eps)
    run = _in_sets(rms_norm, "_PARTS", backward) if back else forward
    return Case(run, 4 * x.nbytes, x.numel())


def rotary_positions(back: bool) -> Case:
    """372 tokens of 3 sequences, with a bias."""
    action, moved = tune_kernels.rotated(torch.device("cpu"), 124, 3, back)
    run = _in_sets(rope, "_BLOCKS", action) if back else action
    return Case(run, moved, moved // 4)  # of two bytes, read and written


def gated(back: bool) -> Case:
    """SwiGLU of 12 rows; a number is one of its product."""
    x, by = _bf16(12, 2 * memory_bound_speed.WIDTH), _bf16(12, memory_bound_speed.WIDTH)
    run = partial(swiglu.backward, by, x) if back else partial(swiglu.forward, x)
    return Case(run, (5 if back else 3) * by.nbytes, by.numel())


def into_fp8(what: str) -> Case:
    """256 rows of 512 columns both ways, one scale that is known."""
    gates, by = _bf16(256, 1024), _bf16(256, 512)
    matrix: Matrix
    matrix, read = {
        "matrix": (by, by.nbytes),
        "swiglu": (Gated(gates), gates.nbytes),
        "gradient": (GatedGradient(gates, by), gates.nbytes + by.nbytes),
    }[what]
    with ways.using("reference"):
        known = amax_of(matrix)
        numbers = written(matrix).numel()
    run = partial(quantize, matrix, torch.float8_e4m3fn, "tensor", turned=True, known=known)
    return Case(run, read + 2 * numbers, numbers)


def updated(in_8_bits: bool) -> Case:
    """AdamW of 98,304 parameters of one tensor, with a bf16 copy."""
    count = 98_304
    parameter, gradient, copy = torch.randn(count), torch.randn(count), torch.zeros(count).bfloat16()
    if not in_8_bits:
        first, second = torch.randn(count), torch.rand(count)
        given: list[list[Tensor]] = [[one] for one in (parameter, gradient, first, second)]
        return Case(
            partial(adamw_, *given, adamw_speed.UPDATE, [copy]), adamw_speed.FULL_BYTES * count, count
        )
    coded = [
        moments.encode(one, second=second)
        for one, second in ((torch.randn(count), False), (torch.rand(count), True))
    ]
    ranges = torch.cat([one[1] for one in coded], 1)
    given = [[one] for one in (parameter, gradient, coded[0][0], coded[1][0], ranges)]
    return Case(
        partial(adamw_fp8_moments_, *given, adamw_speed.UPDATE, [copy]),
        adamw_speed.CODED_BYTES * count,
        count,
    )


CASES: dict[str, Callable[[], Case]] = {
    "cross_entropy": cross_entropy,
    "add_rms_norm_forward": partial(add_rms_norm, False),
    "add_rms_norm_backward": partial(add_rms_norm, True),
    "rope_forward": partial(rotary_positions, False),
    "rope_backward": partial(rotary_positions, True),
    "swiglu_forward": partial(gated, False),
    "swiglu_backward": partial(gated, True),
    "quantize_both_ways": partial(into_fp8, "matrix"),
    "quantize_swiglu_both_ways": partial(into_fp8, "swiglu"),
    "quantize_swiglu_gradient_both_ways": partial(into_fp8, "gradient"),
    "adamw": partial(updated, False),
    "adamw_fp8": partial(updated, True),
}


def measure(seed: int, names: list[str]) -> dict[str, tuple[Case, Noted]]:
    """What each op did."""
    found = {}
    way = Traced()
    with ways.using(way):
        for name in names:
            torch.manual_seed(seed)
            case = CASES[name]()
            case.run()
            found[name] = case, way.take()
    return found


def figures_of(name: str, case: Case, noted: Noted) -> dict[str, float]:
    """As the head of this file says."""
    turns, least = noted.sum("turns"), noted.sum("least_turns")
    return {
        f"{name}_traffic": SECTOR * noted.sum("sectors") / case.moved,
        f"{name}_memory": SECTOR * (noted.read + noted.written) / case.moved,
        f"{name}_bytes_a_request": noted.sum("asked") / noted.sum("requests"),
        f"{name}_bank_turns": turns / least if least else 1.0,
        f"{name}_instructions": noted.sum("instructions") / case.numbers,
        f"{name}_special": noted.sum("special") / case.numbers,
    }


def lines_of(case: Case, noted: Noted, most: int = 8) -> Iterator[str]:
    """The source lines that cost most."""
    by_cost = sorted(noted.lines.items(), key=lambda item: -item[1].instructions)
    for (file, line), did in by_cost[:most]:
        yield f"  {file}:{line:<5}{did.instructions / case.numbers:7.2f} instructions a number"
    for (file, line), did in by_cost:
        if did.turns > 1.05 * did.least_turns:
            yield f"  {file}:{line:<5}banks take {did.turns / did.least_turns:.2f} times the turns"
        if SECTOR * did.sectors > 1.05 * did.asked:
            more = SECTOR * did.sectors / case.moved
            a_byte = SECTOR * did.sectors / did.asked
            yield f"  {file}:{line:<5}{a_byte:.2f} bytes for each asked for, {more:.3f} of all"


def main() -> None:
    """Run the benchmark."""
    made = common.parser(__doc__)
    made.add_argument("--lines", action="store_true", help="source lines, too")
    made.add_argument("--ops", nargs="*", default=list(CASES), choices=list(CASES), help="default: all")
    arguments = made.parse_args()
    figures: dict[str, float] = {}
    columns = ("traffic", "memory", "bytes_a_request", "bank_turns", "instructions", "special")
    print(f"{'':<36}" + "".join(f"{column.replace('_', ' '):>17}" for column in columns))
    for name, (case, noted) in measure(arguments.seed, arguments.ops).items():
        its = figures_of(name, case, noted)
        print(f"{name:<36}" + "".join(f"{its[f'{name}_{column}']:>17.2f}" for column in columns))
        if arguments.lines:
            print("\n".join(lines_of(case, noted)))
        figures |= its
    common.write(arguments.json, figures, {})


if __name__ == "__main__":
    main()
