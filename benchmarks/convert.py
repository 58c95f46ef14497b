"""Time and memory of converting a model of davinci-3b's shape, beside a plain copy of the same bytes.

    python benchmarks/convert.py --json FILE --folder DISK

Random weights in bf16 (6.2 GB) are written as a checkpoint. Then, each as a process of its own: a plain copy of its
files, its export with `--skip-verify`, its export with verification, and the import of what was exported. Whoever
writes waits for the disk. The copy is made before and after; its time is the mean. Three times the model's size is
needed on the disk, and is freed again.

`ratio_to_copy` is of the whole command, interpreter and all, without verification; `peak_rss_gb` is of the command
with verification, `import_peak_rss_gb` of the import with verification.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import common


def main() -> int:
    """Measure."""
    parser = common.parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    parser.add_argument("--preset", default="davinci-3b", help="the model's shape")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="davinci-convert-") as root:
        figures, peer = measure(Path(root), given.preset, given.seed)
    common.write(given.json, figures, peer)
    return 0


def measure(root: Path, preset: str, seed: int) -> tuple[dict[str, float], dict[str, Any]]:
    """All figures, and those of the plain copy."""
    source = root / "checkpoint"
    in_a_process(write_checkpoint, source, preset, seed)
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    copies = [in_a_process(copy, source, root / "copy")]
    alone, alone_rss = command("to-hf", source, root / "alone", "--skip-verify")
    copies.append(in_a_process(copy, source, root / "copy"))
    shutil.rmtree(root / "alone")
    checked, checked_rss = command("to-hf", source, root / "hf")
    verification = json.loads((root / "hf" / "training_manifest.json").read_text())["verification"]
    back, back_rss = command("from-hf", root / "hf", root / "back")
    plain = sum(copies) / len(copies)
    figures = {
        "gigabytes": size / 1e9,
        "ratio_to_copy": alone / plain,
        "peak_rss_gb": checked_rss,
        "max_logit_difference": verification["max_logit_difference"],
        "max_layer_difference": verification["max_layer_difference"],
        "convert_seconds": alone,
        "convert_peak_rss_gb": alone_rss,
        "convert_and_verify_seconds": checked,
        "import_and_verify_seconds": back,
        "import_peak_rss_gb": back_rss,
    }
    return figures, {"name": "a plain copy of the same bytes, with fsync", "seconds": plain, "each": copies}


def command(direction: str, source: Path, out: Path, *options: str) -> tuple[float, float]:
    """Seconds of a command, and the most memory that it had, in GB."""
    words = [
        sys.executable,
        "-m",
        "megatron_davinci.cli.main",
        "convert",
        direction,
        str(source),
        str(out),
        *options,
    ]
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"davinci convert {direction} failed")
    return seconds, usage.ru_maxrss * 1024 / 1e9


def in_a_process(function: Any, *given: Any) -> float:
    """Seconds of a function in a fresh process, whose memory is gone afterwards."""
    started = time.perf_counter()
    process = multiprocessing.get_context("spawn").Process(target=function, args=given)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed")
    return time.perf_counter() - started


def copy(source: Path, target: Path) -> None:
    """Copy all files, and wait for the disk."""
    shutil.rmtree(target, ignore_errors=True)
    for path in source.rglob("*"):
        if path.is_file():
            to = target / path.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)
            with open(to, "rb+") as file:
                os.fsync(file.fileno())


def write_checkpoint(out: Path, preset: str, seed: int) -> None:
    """A checkpoint of a preset's shape with random weights in bf16, a layer of a tensor in memory at a time."""
    import torch

    from megatron_davinci.config.model import PRESETS, ModelConfig
    from megatron_davinci.convert.families import family_of
    from megatron_davinci.convert.write_state import Source, write_state
    from megatron_davinci.train import checkpoint_files
    from megatron_davinci.train.new_files import NewFiles

    model = ModelConfig.model_validate({"preset": preset, **PRESETS[preset]}).model_dump(mode="json")
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...], deviation: float, mean: float, layer: int | None = None) -> torch.Tensor:
        drawn = torch.empty(shape, dtype=torch.bfloat16)
        return drawn.normal_(mean, deviation, generator=generator)

    tensors = {}
    for rule in family_of(model).rules_of(model):
        shape = rule.stored_shape(model)
        norm = len(rule.shape) == 1 and not rule.mcore.endswith("bias")
        # As after training: products that neither vanish nor explode on their way through the layers.
        deviation = 0.1 if len(rule.shape) == 1 else 0.02
        one = partial(draw, shape[1:] if rule.per_layer else shape, deviation, 1.0 if norm else 0.0)
        layer = (lambda number, one=one: one()) if rule.per_layer else None
        tensors[rule.stored] = Source(torch.bfloat16, shape, one, layer)
    temporary = checkpoint_files.begin(out.parent, 0)
    files = NewFiles(temporary)
    write_state(temporary / "state", tensors, files.open)
    description = {"step": 0, "consumed_samples": 0, "model": model, "weights_only": True}
    checkpoint_files.commit(temporary, out, description, files.entries, latest=False)


if __name__ == "__main__":
    sys.exit(main())
