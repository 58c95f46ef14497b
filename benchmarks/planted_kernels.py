"""Does the emulator see what it is there to see? Faults are planted into the kernels, and changes that are none.

Of each list ten are drawn. A change is made in the sources' text, the emulator is made from it with AddressSanitizer,
and random cases of the op are held against float64. A fault is caught when the emulator or AddressSanitizer reports,
or a number is further from float64 than rounding explains; a clean twin, a change of the same places that computes
the same, must pass the same.

Figures: `planted_caught` of `planted`, `clean_passed` of `clean`.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common  # noqa: E402
from megatron_davinci.kernels import compilers, sources  # noqa: E402
from megatron_davinci.kernels.table import OPS, Kernel  # noqa: E402

DRAWN = 10
TRIALS = 40
OF_MANY_KINDS = 100  # trials of an op of which a fault is in one kernel of several


@dataclass(frozen=True)
class Change:
    """A change of a source's text.

    Attributes:
        name: What it does.
        op: Whose trials it is held against.
        file: The source.
        old: The text that is exchanged, where it stands first.
        new: What for.
    """

    name: str
    op: str
    file: str
    old: str
    new: str

    def apply(self, texts: dict[str, str]) -> dict[str, str]:
        """The sources with it.

        Raises:
            ValueError: The text is not there, so the list is older than the sources.
        """
        if self.old not in texts[self.file]:
            raise ValueError(f"{self.name}: {self.file} has no {self.old!r}")
        return texts | {self.file: texts[self.file].replace(self.old, self.new, 1)}


def _change(name: str, file: str, old: str, new: str, op: str = "cross_entropy") -> Change:
    return Change(name, op, file, old, new)


def _of_norm(name: str, old: str, new: str, file: str = "rms_norm.cu") -> Change:
    return _change(name, file, old, new, "rms_norm")


def _of_adamw(name: str, file: str, old: str, new: str) -> Change:
    return _change(name, file, old, new, "adamw")


def _of_codes(name: str, old: str, new: str, file: str = "quantize.cu") -> Change:
    return _change(name, file, old, new, "quantize")


_FIRST_WRITE = "    largest[warp] = value.largest;\n    total[warp] = value.total;\n  }\n  __syncthreads();\n"
_LAST_BARRIER = "  __syncthreads();  // the next row writes where this one is read\n"
_VECTORS = "v < vectors; v += kBlock"
_BATCHES = "(vectors - begin) / kStep"
_TARGET = "    if (threadIdx.x == 0) target[r] = target_of(wanted, row);\n"
_WANTED = "    if (row.label >= 0) wanted = logits[r * width + row.label];\n"
_TAIL = """  for (int i = parts.tail + (int)threadIdx.x; i < parts.width; i += kBlock)
    if (i < columns) sum = add(sum, load(row[i]));
"""
_WRITES = "    write_gradient<kWholeThreads, true>(at, parts, rest, gradient);\n"
_KEPT = "known_global(body.at)[v] = gradient.vector<T>(kept[k]"
_WAITS = "wait_but<kBehind>()"

_OF_TILE = "aligned ? end / kAtOnce : 0"
_LAST = "    for (int i = rest + (int)threadIdx.x; i < end; i += kThreads) one(s, span, i);\n"
_BACK = "      exchange(held.first);\n      exchange(held.second);\n      put"
_NEXT_RUN = "        ask_first(after);\n      exchange"
_NO_GROUPS = "    if (mine >= whole) ask_first(after);\n"

_SUMS_THERE = "    __syncthreads();\n    const int here = kWords"
_STILL_READ = "      __syncthreads();  // warps may still read what was here\n"

_JOINED = "        __syncthreads();\n        if (threadIdx.x < kTile) {"
_NEXT_TILE = "    __syncthreads();  // the next tile writes where this one is read\n"
_NEXT_HALF = "      __syncthreads();  // the next half writes where this one is read\n"
_GRADIENT = "quantize_gradient.cu"

FAULTS = [
    _change("barrier removed", "reduce.h", _FIRST_WRITE, _FIRST_WRITE.replace("  __syncthreads();\n", "")),
    _change("barrier before the next row removed", "reduce.h", _LAST_BARRIER, ""),
    _change("barrier that one warp comes to", "reduce.h", _LAST_BARRIER, "  if (warp == 0) __syncthreads();\n"),
    _change("one vector too many", "cross_entropy.cu", _VECTORS, _VECTORS.replace("<", "<=")),
    _change("one vector too few", "cross_entropy.cu", _VECTORS, _VECTORS.replace("vectors;", "vectors - 1;")),
    _change("one batch too many", "cross_entropy.cu", _BATCHES, f"{_BATCHES} + 1"),
    _change("tail left out", "cross_entropy.cu", _TAIL, ""),
    _change("head of the wrong length", "portable.h", "Vector<T>::kWidth - past", "past"),
    _change("mask of half a warp", "reduce.h", "kAllLanes = 0xffffffffu", "kAllLanes = 0x0000ffffu"),
    _change("half of the lanes not reduced", "reduce.h", "int bits = 16; bits", "int bits = 8; bits"),
    _change("shared memory of one warp only", "reduce.h", "  if (lane == 0) {", "  if (threadIdx.x == 0) {"),
    _change("shared memory too small", "reduce.h", "DAVINCI_SHARED(float, total, kWarps)",
                   "DAVINCI_SHARED(float, total, kWarps - 1)"),
    _change("rescaled the wrong way", "reduce.h", "exponential(from - to)", "exponential(to - from)"),
    _change("label not of this rank's columns", "cross_entropy.cu", "-1 : (int)(label_ - first)", "-1 : (int)label_"),
    _change("padding in the sum", "cross_entropy.cu", "if (base + Vector<T>::kWidth > columns) {",
                   "if (base > columns) {"),
    _change("largest of a vector not the sum's", "cross_entropy.cu", "    sum.largest = largest;\n", ""),
    _change("kept vectors written by a neighbour", "cross_entropy.cu", _KEPT, _KEPT.replace("[v]", "[v ^ 1]")),
    _change("what is scaled to itself taken by its scale alone", "cross_entropy.cu", "(a == 1.0f && b == 0.0f)",
                   "a == 1.0f"),
    _change("logit read after it is overwritten", "cross_entropy.cu", _WRITES,
                   _WRITES + _WANTED + _TARGET),
    _change("bf16 cut off instead of rounded", "portable.h", "  bits += 0x7fffu + ((bits >> 16) & 1u);\n", ""),
    _change("rows taken twice", "cross_entropy.cu", "r - gridDim.x < rows; r += gridDim.x",
            "r - gridDim.x < rows; r += 1"),
    _change("vectors taken before they have arrived", "cross_entropy.cu", _WAITS, "wait_but<kBehind + 1>()"),
    _change("this row's vectors asked for again", "cross_entropy.cu",
            "if (v < coming) begin_copy(held, v, next.at + v)", "if (v < here) begin_copy(held, v, body.at + v)"),
    _change("ignored labels not known", "cross_entropy.cu", "ignored = label_ == ignored_;", "ignored = false;"),
    _of_norm("two sums in one place", "turn * kWarps + warp] = value", "warp] = value", "reduce.h"),
    _of_norm("row past the last", "const int mine = r < rows ? vectors : 0;", "const int mine = vectors;"),
    _of_norm("rows of a part skipped", "first += parts * kRows", "first += 2 * parts * kRows"),
    _of_norm("gradient along the residual left out", "by_sum ? value + load(beside", "false ? value + load(beside"),
    _of_norm("columns of a warp not all added", "warp < kThreads / 32; ++warp) sum",
             "warp < kThreads / 32 - 1; ++warp) sum", "reduce.h"),
    _change("heads turned one way in one half", "rope.cu", "cosine[k] + before * sine[k]",
            "cosine[k] - before * sine[k]", "rope"),
    _change("lanes past the last head", "rope.cu", "if (item + 32 * p < items && ", "if (", "rope"),
    _change("a token's row of the table one too late", "rope.cu", "of_row >= (u32)batch", "of_row > (u32)batch",
            "rope"),
    _change("sums of the last warp left out", "rope.cu", "warp < kWarps; ++warp)", "warp < kWarps - 1; ++warp)",
            "rope"),
    _change("sums read before all are there", "rope.cu", _SUMS_THERE, "    const int here = kWords", "rope"),
    _change("the bias written where warps still read", "rope.cu", _STILL_READ, "", "rope"),
    _change("the next token in place of this", "rope.cu", "const Token now = next;",
            "const Token& now = next;", "rope"),
    _change("all heads of a group turned", "rope.cu", "const bool turned = of_group < rotated;",
            "const bool turned = of_group < heads;", "rope"),
    _change("rows counted one at a time", "swiglu.cu", "row += p / packs;", "row += 1;", "swiglu"),
    _change("exponentials without a bound", "gated.h", "return fminf(power_of_two(-gate * kLog2E), 1e38f);",
            "return power_of_two(-gate * kLog2E);", "swiglu"),
    _change("a sequence that begins no document", "documents.cu", "(i == 0 || ", "(i != 0 && ", "document_bounds"),
    _of_codes("gates taken for what they gate", "reinterpret_cast<const Raw*>(here + columns)",
              "reinterpret_cast<const Raw*>(here)"),
    _of_codes("rows normalised by the first one's scale", "scale[row]};", "scale[0]};"),
    _of_codes("columns of a tile joined before all are there", _JOINED, _JOINED.replace("__syncthreads();", "")),
    _of_codes("the next tile written where this one is read", _NEXT_TILE, ""),
    _of_codes("a warp's second row of patches left out", "larger(found, __shfl_xor_sync(kAllLanes, found, kAcross))",
              "found"),
    _of_codes("rows of half the lanes", "largest_of_row(r), kAcross / 2", "largest_of_row(r), kAcross / 4"),
    _of_codes("scales of the tile above", "inverse[left / kTile * rows", "inverse[top / kTile * rows"),
    _of_codes("patches past the matrix", "patch.row < rows && patch.column < columns", "patch.row < rows"),
    _of_codes("a half written where the other is read", _NEXT_HALF, "", _GRADIENT),
    _of_codes("rows taken before they have arrived", "wait_but<A::kRows - 1>()", "wait_but<A::kRows>()", _GRADIENT),
    _of_codes("rows past the gradient's last", "if (row >= rows) row = rows - kPatch;", "", _GRADIENT),
    _of_codes("what is gated in the gates' columns", "(half * width + left + down) * rows", "(left + down) * rows",
              _GRADIENT),
    _of_codes("half of a patch turned", "    turn(high[0], high[1], high[2], high[3]);\n", "", "quantize.h"),
    _of_codes("largest numbers of even columns alone", "return larger(of(0), of(1));", "return of(0);", "quantize.h"),
    _of_codes("columns scaled by the rows' scales", "patch.scaled_column(c, of_columns[across * kPatch + c])",
              "patch.scaled_column(c, of_row[c])"),
    _of_adamw("last elements of a run left out", "adamw.cu", _LAST, ""),
    _of_adamw("one vector of a tile too many", "adamw.cu", _OF_TILE, _OF_TILE.replace(" :", " + 1 :")),
    _of_adamw("a run's last tile left out", "adamw.cu", "begin >= span.count", "begin + kTile > span.count"),
    _of_adamw("runs drawn a second time", "adamw.cu", "    place ^= 1;\n", ""),
    _of_adamw("a lane left out of a reduction", "moments.h", "bits = kLanes / 2; bits;",
              "bits = kLanes / 2; bits > 1;"),
    _of_adamw("groups of fewer lanes", "adamw.cu", "threadIdx.x % kLanes * kAtOnce",
              "threadIdx.x % (kLanes / 2) * kAtOnce"),
    _of_adamw("the other four given away", "adamw.cu", "upper ? fours[0] : fours[1]", "upper ? fours[1] : fours[0]"),
    _of_adamw("first moments not given back", "adamw.cu", _BACK, _BACK.replace("exchange(held.first)", "", 1)),
    _of_adamw("codes of the warp's other group", "adamw.cu", "group - lane / moments::kLanes", "group"),
    _of_adamw("the next group in place of this", "adamw.cu", "Held held = next;\n", "Held& held = next;\n"),
    _of_adamw("this run's first group in place of the next one's", "adamw.cu", _NEXT_RUN,
              _NEXT_RUN.replace("ask_first(after)", "ask(span, mine)")),
    _of_adamw("a warp without groups asks for none of the next run", "adamw.cu", _NO_GROUPS, ""),
    _of_adamw("zeros as the smallest", "moments.h", "smaller(least, size - 1)", "smaller(least, size)"),
    _of_adamw("the gradient not scaled", "adamw.cu", "s.scale * gradient", "gradient"),
]  # fmt: skip

TWINS = [
    _of_codes("columns of a tile joined by the last threads",
              "if (threadIdx.x < kTile) {\n          u32 found = 0;\n          for (int w = 0",
              "if (threadIdx.x < kTile) {\n          u32 found = largest[threadIdx.x];\n          for (int w = 1"),
    _of_codes("words in place by another formula", "column * kAcross + column / kPatch + part",
              "column * kAcross + (column >> 3) + part", "quantize.h"),
    _of_codes("all rows on their way waited for", "wait_but<A::kRows - 1>()", "wait_but<0>()", _GRADIENT),
    _of_codes("tiles from the last on", "i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x",
              "i64 tile = tiles - 1 - blockIdx.x; tile >= 0; tile -= gridDim.x"),
    _change("barrier doubled", "reduce.h", _FIRST_WRITE, _FIRST_WRITE + "  __syncthreads();\n"),
    _change("barrier of the warp besides", "reduce.h", _LAST_BARRIER, _LAST_BARRIER + "  __syncwarp(kAllLanes);\n"),
    _change("vectors counted otherwise", "cross_entropy.cu", _VECTORS,
                   _VECTORS.replace("v < vectors", "v <= vectors - 1")),
    _change("one batch fewer", "cross_entropy.cu", _BATCHES, f"({_BATCHES} > 0 ? {_BATCHES} - 1 : 0)"),
    _change("tail from its end", "cross_entropy.cu", _TAIL,
                   "  for (int i = parts.width - 1 - (int)threadIdx.x; i >= parts.tail; i -= kBlock)\n"
                   "    if (i < columns) sum = add(sum, load(row[i]));\n"),
    _change("nothing kept longer than a pass", "cross_entropy.cu", _KEPT,
            "known_global(body.at)[v] = gradient.vector<T>(body.at[v]"),
    _change("all rows scaled", "cross_entropy.cu", " || (a == 1.0f && b == 0.0f)", ""),
    _change("head by another formula", "portable.h", "past ? Vector<T>::kWidth - past : 0",
                   "(Vector<T>::kWidth - past) % Vector<T>::kWidth"),
    _change("no vectors at all", "portable.h", "vectors = (columns - head) / Vector<T>::kWidth", "vectors = 0"),
    _change("mask written otherwise", "reduce.h", "kAllLanes = 0xffffffffu", "kAllLanes = ~0u"),
    _change("lanes reduced in another order", "reduce.h", "int bits = 16; bits; bits >>= 1",
                   "int bits = 1; bits < 32; bits <<= 1"),
    _change("the last lane writes", "reduce.h", "  if (lane == 0) {", "  if (lane == 31) {"),
    _change("shared memory larger", "reduce.h", "DAVINCI_SHARED(float, total, kWarps)",
                   "DAVINCI_SHARED(float, total, kWarps + 5)"),
    _change("label compared otherwise", "cross_entropy.cu", "-1 : (int)(label_ - first)",
                   "-1 : -(int)(first - label_)"),
    _change("another thread reads the logit", "cross_entropy.cu", _TARGET, _TARGET.replace("== 0", "== 21")),
    _change("all vectors waited for at once", "cross_entropy.cu", _WAITS, "wait_but<0>()"),
    _of_norm("two sums by turns the other way", "int turn = 0;", "int turn = 1;"),
    _of_norm("rows counted otherwise", "const int mine = r < rows ? vectors : 0;",
             "const int mine = r <= rows - 1 ? vectors : 0;"),
    _of_norm("columns of a warp added from the last", "int warp = 0; warp < kThreads / 32; ++warp) sum",
             "int warp = kThreads / 32 - 1; warp >= 0; --warp) sum", "reduce.h"),
    _change("tokens by warps the other way", "rope.cu", "first = part * kWarps + warp,",
            "first = part * kWarps + kWarps - 1 - warp,", "rope"),
    _change("sums in a part of shared memory at a time", "rope.cu", "room = slots_here(kThreads, kSlots)", "room = 3",
            "rope"),
    _change("two passes over a token's heads", "rope.cu", "kPasses = 5;", "kPasses = 2;", "rope"),
    _change("rows counted by a product", "swiglu.cu", "p %= packs;", "p -= p / packs * packs;", "swiglu"),
    _change("a sequence that begins at less than 1", "documents.cu", "i == 0 ||", "i < 1 ||", "document_bounds"),
    _of_adamw("last elements of a run by other threads", "adamw.cu", _LAST,
              _LAST.replace("(int)threadIdx.x", "kThreads - 1 - (int)threadIdx.x", 1)),
    _of_adamw("no runs in vectors", "adamw.cu", "& 15) == 0 && (row[5] & 7) == 0", "& 15) == 1"),
    _of_adamw("groups from the last on", "adamw.cu", "group = first + mine;",
              "group = first + kStep - 1 - mine;"),
    _of_adamw("tiles of runs from the last on", "adamw.cu",
              "unit = blockIdx.x; unit < count * tiles; unit += gridDim.x",
              "unit = count * tiles - 1 - blockIdx.x; unit >= 0; unit -= gridDim.x"),
    _of_adamw("another lane writes the ranges", "adamw.cu", "threadIdx.x % moments::kLanes == 0 &&",
              "threadIdx.x % moments::kLanes == 1 &&"),
    _of_adamw("the smallest as what is largest upside down", "moments.h",
              "value = smaller(value, __shfl_xor_sync(kAllLanes, value, bits))",
              "value = ~larger(~value, ~__shfl_xor_sync(kAllLanes, value, bits))"),
]  # fmt: skip


def build(change: Change, folder: Path, kind: str = "plain") -> Path:
    """The emulator with a change; of the ops only what its trials need, since that compiles faster."""
    name = change.name.replace(" ", "-")
    where = folder / name
    where.mkdir()
    texts = change.apply(sources.files())
    files = {kernel.source for kernel in _kernels_for(change)}
    others = {kernel.source for kernels in OPS.values() for kernel in kernels} - files
    for other in others:
        texts[sources.WHOLE] = texts[sources.WHOLE].replace(f'#include "{other}"\n', "")
    for file, text in texts.items():
        (where / file).write_text(text)
    return compilers.emulator(kind, where=where, out=folder / f"{name}.so")


def _kernels_for(change: Change) -> tuple[Kernel, ...]:
    """Of the op, and of those that make what it is tried on."""
    beside = ("rms_norm", "swiglu") if change.op == "quantize" else ()
    return tuple(kernel for op in (change.op, *beside) for kernel in OPS[op])


@contextmanager
def emulated_by(path: Path, change: Change) -> Iterator[None]:
    """Ops run by this library."""
    from megatron_davinci.kernels import ways
    from megatron_davinci.kernels.library import Library

    library = Library(path, digest=sources.digest(path.with_suffix("")), kernels=_kernels_for(change))
    with ways.using(ways.Loaded("emulator", change.name, library)):
        yield


def try_it(change: Change, path: Path, draw: random.Random, trials: int | None = None) -> str:
    """What gave a change away; empty where nothing did."""
    import torch

    from benchmarks import kernel_trials
    from megatron_davinci.kernels.library import KernelError

    reports: list[str] = []
    with _sanitizer(reports.append), emulated_by(path, change):
        for _ in range(trials or (OF_MANY_KINDS if change.op == "quantize" else TRIALS)):
            os.environ["DAVINCI_EMULATOR_SEED"] = str(draw.randrange(1, 2**31))
            try:
                worst = kernel_trials.TRIALS[change.op](draw.randrange(2**31), torch.device("cpu"))
            except KernelError as error:
                return str(error)
            if reports:
                return next((line for line in reports[0].splitlines() if "ERROR" in line), reports[0])
            if worst.ratio > 1:
                return f"{worst.what}: {worst.ratio:.3g} times the error that rounding explains"
    return ""


@contextmanager
def _sanitizer(say: Callable[[str], None]) -> Iterator[None]:
    """Tells what AddressSanitizer reports, where its runtime is in this process."""
    kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
    told = kind(lambda text: say(text.decode(errors="replace")))
    try:
        listen = ctypes.CDLL(None).__asan_set_error_report_callback
    except AttributeError:
        yield
        return
    listen(told)
    try:
        yield
    finally:
        listen(None)


def measure(seed: int) -> tuple[dict[str, float], list[str]]:
    """Draw, plant, and try under AddressSanitizer; returns figures, and a line for each change."""
    draw = random.Random(seed)
    # Clean ones first: what a fault has done to a process is then nothing to them.
    chosen = [(False, change) for change in draw.sample(TWINS, DRAWN)]
    chosen += [(True, change) for change in draw.sample(FAULTS, DRAWN)]
    runtime = compilers.sanitizer_runtime()
    kind = "plain" if runtime is None else "sanitized"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            paths = list(pool.map(lambda one: build(one[1], folder, kind), chosen))
        said = _said_of(paths, folder / "asan", runtime, draw)
    lines, caught, passed = [], 0, 0
    for (planted, change), how in zip(chosen, said, strict=True):
        caught += planted and bool(how)
        passed += not planted and not how
        right = bool(how) == planted
        how = re.sub(r"/\S+/(?=\w+\.(?:cu|h):)", "", how)  # a source by its name: the folder is gone
        lines.append(
            f"{'  ' if right else '! '}{'fault' if planted else 'twin ':<6}{change.name:<40}{how or 'passes'}"
        )
    figures = {"planted": DRAWN, "planted_caught": caught, "clean": DRAWN, "clean_passed": passed}
    return figures, lines


def _said_of(paths: list[Path], log: Path, runtime: str | None, draw: random.Random) -> list[str]:
    """What gave each library away. A process that one of them ends is followed by another for the rest."""
    environment = os.environ | {"ASAN_OPTIONS": f"detect_leaks=0:halt_on_error=0:log_path={log}"}
    if runtime is not None:
        environment["LD_PRELOAD"] = runtime
    said: list[str] = []
    while len(said) < len(paths):
        command = [
            sys.executable,
            __file__,
            "--try",
            str(draw.randrange(2**31)),
            *map(str, paths[len(said) :]),
        ]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=900
        )
        found = done.stdout.split("\n")[:-1]
        said += found
        # What one change has done to memory may end the process later, at another: that is then tried once more.
        if done.returncode and not found:
            reports = "".join(path.read_text(errors="replace") for path in sorted(log.parent.glob("asan.*")))
            errors = [line for line in (reports + done.stderr).splitlines() if "rror" in line]
            said.append(f"the process ended with {done.returncode}: {errors[-1] if errors else ''}")
    return said[: len(paths)]


def _try_all(seed: int, paths: list[str]) -> None:
    """In the process that has AddressSanitizer: a line for each library, what gave it away."""
    by_name = {change.name.replace(" ", "-"): change for change in (*FAULTS, *TWINS)}
    draw = random.Random(seed)
    for path in map(Path, paths):
        print(try_it(by_name[path.stem], path, draw).replace("\n", " "), flush=True)


def main() -> None:
    """Run the benchmark."""
    if sys.argv[1:2] == ["--try"]:
        _try_all(int(sys.argv[2]), sys.argv[3:])
        return
    arguments = common.parser(__doc__).parse_args()
    figures, lines = measure(arguments.seed)
    print("\n".join(lines))
    common.write(arguments.json, figures, peer={"changes": lines})


if __name__ == "__main__":
    main()
