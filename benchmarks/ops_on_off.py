"""The tiny model with each of our ops, and with all, against the same training with none: fp32, step by step.

Ops run by the way of the device: kernels on a GPU, plain torch on a CPU, or what `DAVINCI_KERNELS` names (the
emulator, which takes some minutes). Documents begin anew inside sequences. Figures: `loss_difference_OP`, the largest
relative difference of a step's loss, and `worst_loss_difference`, of all; `loss_first` and `loss_last` with none.
"""

from __future__ import annotations

import sys
import typing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import common
from megatron_davinci.config.backends import BackendsConfig

STEPS = 200
BATCH, LENGTH, VOCABULARY = 8, 32, 128


def ops() -> dict[str, dict[str, Any]]:
    """The settings under `backends` that turn each on."""
    places = [
        place
        for place, field in BackendsConfig.model_fields.items()
        if "davinci" in typing.get_args(field.annotation)
    ]
    each: dict[str, dict[str, Any]] = {place: {place: "davinci"} for place in places}
    each["loss_by_chunks"] = {"loss": "davinci", "loss_chunk_tokens": 100}
    return {**each, "all": dict.fromkeys(places, "davinci")}


def settings(backends: dict[str, Any], device: str, seed: int) -> dict[str, Any]:
    """Of a run whose layers are ours in either case, so that the ops are all that differs."""
    return {
        "run": {"directory": "run", "seed": seed},
        "model": {
            "num_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 96,
            "vocab_size": VOCABULARY,
            "max_sequence_length": LENGTH,
        },
        "parallel": {"device": device},
        "backends": {"layers": "local", "optimizer": "torch", **backends},
        "data": {"sequence_length": LENGTH, "sources": {"text": {"path": "text"}}},
        "curriculum": [
            {
                "name": "all",
                "tokens": "1M",
                "mixture": {"text": 1},
                "global_batch_size": BATCH,
                "learning_rate": {"peak": 1e-3},
            }
        ],
        "train": {"precision": "fp32", "micro_batch_size": BATCH // 2, "z_loss": 1e-4},
    }


def tokens_of(seed: int, step: int) -> torch.Tensor:
    """Sequences that can be learnt in part: token after token a fixed stride on, and now and then the end of one."""
    g = torch.Generator().manual_seed(1000 * seed + step)
    first = torch.randint(VOCABULARY, (BATCH, 1), generator=g)
    stride = torch.randint(1, 4, (BATCH, 1), generator=g)
    rows = (first + stride * torch.arange(LENGTH + 1)) % VOCABULARY
    return rows.masked_fill(torch.rand(rows.shape, generator=g) < 0.05, 0)


def losses(backends: dict[str, Any], platform: Any, seed: int, steps: int) -> list[float]:
    """The loss of each step."""
    from megatron_davinci.config import validate
    from megatron_davinci.model.build import build_model
    from megatron_davinci.model.documents import DocumentMask
    from megatron_davinci.optim.build import build_optimizer, set_hyperparameters
    from megatron_davinci.platform import distributed
    from megatron_davinci.train.step import Stepper, wrap_model

    config = validate(settings(backends, platform.name, seed), "benchmarks/ops_on_off.py")
    distributed.seed_ranks(seed)
    wrapped = wrap_model(build_model(config, platform), config)
    optimizer = build_optimizer(config, wrapped)
    stepper = Stepper(wrapped, optimizer, config, platform)
    mask, found = DocumentMask(eod_id=0, reset_positions=True), []
    for step in range(steps):
        set_hyperparameters(
            optimizer,
            learning_rate=2e-3 * min(1.0, (step + 1) / 20),
            weight_decay=config.optimizer.weight_decay,
        )
        found.append(stepper.train(tokens_of(seed, step), 2, None, mask).loss)
    return found


def differences(
    device: str, seed: int, steps: int, some: list[str] | None = None
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The figures, and the losses themselves; of some ops, or of each."""
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose

    platform = choose(device)  # type: ignore[arg-type]
    distributed.start(platform)
    off = losses({}, platform, seed, steps)
    curves, figures = {"none": off}, {"loss_first": off[0], "loss_last": off[-1]}
    for op, backends in ops().items():
        if some is not None and op not in some:
            continue
        curves[op] = losses(backends, platform, seed, steps)
        pairs = zip(curves[op], off, strict=True)
        figures[f"loss_difference_{op}"] = max(abs(on - other) / other for on, other in pairs)
    figures["worst_loss_difference"] = max(v for k, v in figures.items() if k.startswith("loss_difference_"))
    distributed.stop()
    return figures, curves


def main() -> None:
    """Run the benchmark."""
    made = common.parser(__doc__ or "")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--steps", type=int, default=STEPS)
    made.add_argument("--only", nargs="+", choices=tuple(ops()), metavar="OP", help="default: each, and all")
    arguments = made.parse_args()
    figures, curves = differences(arguments.device, arguments.seed, arguments.steps, arguments.only)

    from megatron_davinci.kernels.ways import way_for

    way = way_for(torch.device("cuda" if torch.cuda.is_available() and arguments.device != "cpu" else "cpu"))
    common.write(arguments.json, figures, {"way": str(way), "steps": arguments.steps, "losses": curves})


if __name__ == "__main__":
    main()
