"""davinci-3b at bf16 on one GPU, with the levers on and off, one row each.

Each row is a process of its own with a few steps of the whole model: forward, backward, the update. What does not fit
into the GPU's memory says so in its row. Rows that would begin after `--seconds` are left out and named.
Without CUDA it says so and ends; `--tiny --device cpu` runs every row on a small model, to try the script.

figures, by row: ROW_tokens_per_second, ROW_seconds_a_step, ROW_peak_gib (CUDA), ROW_teraflops (model FLOPs a second,
causal attention counted by the half that is computed), ROW_flops_utilization (of what a large matrix product of bf16
reaches here), ROW_data_sheet_utilization (of the data sheet's 989 of an H100 or H200), ROW_fits (1 or 0)
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

OPS: dict[str, Any] = {
    f"backends.{op}": "davinci" for op in ("loss", "norm", "rope", "swiglu", "optimizer", "weight_gradient")
}
_FOUR: dict[str, Any] = {**OPS, "train.micro_batch_size": 4}


def _native(recipe: str, **more: Any) -> dict[str, Any]:
    low = {"recipe": recipe, "backend": "native", "keep_codes": True, **more}
    return {**_FOUR, "train.low_precision": low}


# A lever is a row: the settings that it changes of `off`.
ROWS: dict[str, dict[str, Any]] = {
    # Ours in bf16, and products of FP8 without Transformer Engine beside it. On 80 GB they do not fit.
    "davinci_ops": _FOUR,
    "native_delayed": _native("delayed"),
    "native_current": _native("current"),
    "native_block": _native("block"),
    "davinci_ops_fp8_moments": {**_FOUR, "optimizer.moments": "fp8"},
    "native_delayed_fp8_moments": {**_native("delayed"), "optimizer.moments": "fp8"},
    "native_delayed_codes_made_again": _native("delayed", keep_codes=False),
    "off": {},
    "davinci_loss": {"backends.loss": "davinci"},
    "davinci_ops_micro_batch_1": OPS,
    "davinci_ops_micro_batch_1_in_chunks": {**OPS, "backends.loss_chunk_tokens": 2048},
    "davinci_ops_micro_batch_2_fp8_moments": {
        **OPS,
        "optimizer.moments": "fp8",
        "backends.loss_chunk_tokens": 2048,
        "train.micro_batch_size": 2,
    },
    "native_current_fp8_activations": _native("current", activations="fp8", keep_codes=False),
    "recompute_norms": {"train.recompute": {"granularity": "selective", "modules": ["layernorm"]}},
    "recompute_norms_mlp": {"train.recompute": {"granularity": "selective", "modules": ["layernorm", "mlp"]}},
    "recompute_full": {"train.recompute": {"granularity": "full"}},
    "recompute_full_micro_batch_4": {
        "train.recompute": {"granularity": "full"},
        "train.micro_batch_size": 4,
    },
    "overlap_gradient_reduce": {"parallel.overlap_gradient_reduce": True},
    "local_layers": {"backends.layers": "local"},
    "phase_timers_off": {"logging.phases": False},
}
BATCH = 16  # sequences a step, of every row alike: a GPU's part of 1,024 on 64


def main() -> None:
    """Measure every row and report."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument(
        "--steps", type=int, default=3, help="steps that are measured, after two that warm up"
    )
    parser.add_argument("--seconds", type=float, default=450.0, help="no row begins after this")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        arguments.json.write_text(json.dumps(measure(arguments)))
        return
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "skipped: torch finds no CUDA device (docs/install-gpu.md; --tiny --device cpu tries the script)"
        )
        return
    figures: dict[str, float] = {}
    left_out, failed, begin = [], {}, time.monotonic()
    for row in arguments.rows:
        if time.monotonic() - begin > arguments.seconds:
            left_out.append(row)
            continue
        found, problem = in_a_process(row, arguments)
        figures |= {f"{row}_{name}": value for name, value in found.items()}
        if problem:
            failed[row] = problem
        print(f"{row}: {problem or found}", flush=True)
    common.write(arguments.json, figures, {"left_out": left_out, "failed": failed, "rows": ROWS})
    if failed:
        sys.exit(1)


def in_a_process(row: str, arguments: Any) -> tuple[dict[str, float], str]:
    """What a row measured, and what went wrong: memory that one row fills is free for the next."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "row.json"
        command = [
            sys.executable,
            __file__,
            "--row",
            row,
            "--json",
            str(answer),
            "--device",
            arguments.device,
        ]
        command += ["--steps", str(arguments.steps), "--seed", str(arguments.seed)]
        done = subprocess.run(
            command + ["--tiny"] * arguments.tiny, capture_output=True, text=True, timeout=400, check=False
        )
        if done.returncode:
            return {}, done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
        return json.loads(answer.read_text()), ""


def settings_of(arguments: Any, folder: str) -> dict[str, Any]:
    """The configuration of a row."""
    length = 128 if arguments.tiny else 4096
    settings: dict[str, Any] = {
        "run": {"directory": folder, "seed": arguments.seed},
        "model": {"preset": "tiny" if arguments.tiny else "davinci-3b"},
        "parallel": {"device": arguments.device},
        "data": {"sequence_length": length, "sources": {"text": {"path": folder}}},
        "curriculum": [
            {
                "name": "all",
                "tokens": "1B",
                "mixture": {"text": 1},
                "global_batch_size": BATCH,
                "learning_rate": {"peak": 1e-4},
            }
        ],
        "train": {"micro_batch_size": 1, "precision": "bf16"},
        "logging": {},
        "backends": {},
        "optimizer": {},
    }
    for key, value in ROWS[arguments.row].items():
        section, name = key.split(".")
        settings[section][name] = value
    return settings


def measure(arguments: Any) -> dict[str, float]:
    """One row, in this process."""
    import torch

    from megatron_davinci.config import validate
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose
    from megatron_davinci.platform.peak import measure_matmul_peak

    with tempfile.TemporaryDirectory() as folder:
        config = validate(settings_of(arguments, folder), where="benchmarks/train_gpu.py")
    platform = choose(arguments.device)
    distributed.start(platform, seed=arguments.seed)
    peak = measure_matmul_peak(platform, torch.bfloat16)
    try:
        laps = steps_of(config, platform, arguments.steps)
    except torch.OutOfMemoryError:
        return {"fits": 0.0}
    finally:
        distributed.stop()
    seconds = statistics.median(laps)
    rate = BATCH * config.data.sequence_length / seconds
    flops = rate * config.model.flops_per_token(config.data.sequence_length)
    found = {
        "fits": 1.0,
        "tokens_per_second": rate,
        "seconds_a_step": seconds,
        "teraflops": flops / 1e12,
        "flops_utilization": flops / peak,
    }
    if platform.name == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if torch.cuda.get_device_name().startswith(("NVIDIA H100 80GB", "NVIDIA H200")):
            found["data_sheet_utilization"] = flops / 989e12
    return found


def steps_of(config: Any, platform: Any, steps: int) -> list[float]:
    """Seconds of each step, after two that warm up."""
    import torch

    from megatron_davinci.model.build import build_model
    from megatron_davinci.optim.build import build_optimizer, set_hyperparameters
    from megatron_davinci.platform.stopwatch import stopwatch
    from megatron_davinci.train.phases import PhaseTimers
    from megatron_davinci.train.step import Stepper, wrap_model

    wrapped = wrap_model(build_model(config, platform), config)
    optimizer = build_optimizer(config, wrapped)
    set_hyperparameters(optimizer, learning_rate=1e-5, weight_decay=0.1)
    timers = PhaseTimers(stopwatch(platform) if config.logging.phases else None)
    stepper = Stepper(wrapped, optimizer, config, platform, timers)
    length, vocabulary = config.data.sequence_length, config.model.vocab_size
    tokens = torch.randint(0, vocabulary, (BATCH, length + 1), device=platform.device)
    laps = []
    for _ in range(2 + steps):
        begin = time.perf_counter()
        stepper.train(tokens, BATCH // config.train.micro_batch_size)
        platform.synchronize()
        timers.end_step()
        timers.finished()
        laps.append(time.perf_counter() - begin)
    return laps[2:]


if __name__ == "__main__":
    main()
