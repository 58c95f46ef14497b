"""What `davinci plan` estimates that a rank holds, against what a rank holds: each recomputation setting and layout.

Real models take real steps on gloo ranks on a CPU, and every tensor that torch makes is counted while it is alive
(`live_bytes.py`). The fullest moment of the forward and backward passes is compared, weights, gradients and optimizer
state included. On a CPU attention is torch's flash kernel for CPUs, which keeps queries, keys, values, output and the
sums of the scores, as its flash kernel for CUDA does; norm and linear layers keep the same on both.

figures: worst_error_fraction (largest |estimate / measured - 1|), worst_activation_error_fraction (of what is there
besides weights, gradients and optimizer state), and error_fraction_SETTING, the worst of each setting
"""

from __future__ import annotations

import multiprocessing as mp
import os
from typing import Any

import common

MODEL = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "ffn_hidden_size": 704,
    "vocab_size": 2048,
    "max_sequence_length": 256,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "layernorm": {"granularity": "selective", "modules": ["layernorm"]},
    "mlp": {"granularity": "selective", "modules": ["mlp"]},
    "core_attn": {"granularity": "selective", "modules": ["core_attn"]},
    "all_modules": {"granularity": "selective", "modules": ["core_attn", "layernorm", "mlp"]},
    "full": {"granularity": "full"},
    "full_block": {"granularity": "full", "method": "block", "layers": 1},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "PP2xVP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "CP2": (2, {"context": 2}),
}
PRECISIONS: dict[str, tuple[int, tuple[str, ...], dict[str, int]]] = {
    "fp32": (2, tuple(LAYOUTS), {}),
    # Where a CPU has no bf16 instructions it is emulated, at a tenth of the speed.
    "bf16": (1, ("1 rank", "TP2+SP", "PP2xVP2"), {"hidden_size": 128, "ffn_hidden_size": 352}),
}
"""And their micro-batch size, layouts, and sizes of the model."""


def main() -> None:
    """Measure and report."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--precisions", nargs="+", choices=tuple(PRECISIONS), default=tuple(PRECISIONS))
    parser.add_argument("--layouts", nargs="+", choices=tuple(LAYOUTS), default=tuple(LAYOUTS))
    arguments = parser.parse_args()
    rows = []
    for precision in arguments.precisions:
        micro, layouts, sizes = PRECISIONS[precision]
        for layout in (name for name in layouts if name in arguments.layouts):
            ranks, parallel = LAYOUTS[layout]
            whole = [
                configuration(parallel, recompute, precision, micro, sizes, seed=arguments.seed)
                for recompute in SETTINGS.values()
            ]
            for name, row in zip(SETTINGS, compare(ranks, whole), strict=True):
                rows.append({"precision": precision, "layout": layout, "recompute": name, **row})
                print(
                    f"{precision}  {layout:<8} {name:<12} estimate {row['estimate'] / 2**20:8.2f} MiB   "
                    f"measured {row['measured'] / 2**20:8.2f} MiB   {100 * row['error_fraction']:+6.2f}%",
                    flush=True,
                )
    figures = {
        "worst_error_fraction": _worst(rows, "error_fraction"),
        "worst_activation_error_fraction": _worst(rows, "activation_error_fraction"),
        **{
            f"error_fraction_{name}": _worst([r for r in rows if r["recompute"] == name], "error_fraction")
            for name in SETTINGS
        },
    }
    common.write(arguments.json, figures, {"name": "bytes of live tensors", "rows": rows})


def configuration(
    parallel: dict[str, Any],
    recompute: dict[str, Any],
    precision: str,
    micro: int,
    sizes: dict[str, int],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Settings of a run with four micro-batches on each of two data-parallel ranks."""
    return {
        "run": {"directory": "run", "seed": seed},
        "model": {**MODEL, **sizes},
        "parallel": {"device": "cpu", **parallel},
        "data": {"sequence_length": 256, "sources": {"text": {"path": "text"}}},
        "curriculum": [
            {
                "name": "all",
                "tokens": "1M",
                "mixture": {"text": 1},
                "global_batch_size": 8 * micro,
                "learning_rate": {"peak": 1e-3},
            }
        ],
        "train": {"precision": precision, "micro_batch_size": micro, "recompute": recompute},
    }


def compare(ranks: int, whole: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Estimate and measurement of the fullest rank, a row for each of several settings of one layout."""
    from megatron_davinci.config import check_layout, validate
    from megatron_davinci.train.memory import plan_memory

    by_rank = on_ranks(ranks, whole)
    rows = []
    for number, settings in enumerate(whole):
        config = validate(settings, "benchmarks/memory.py")
        plan = plan_memory(config, check_layout(config, ranks))
        fullest = max((measured[number] for measured in by_rank), key=lambda measured: measured["total"])
        still = sum(fullest[part] for part in ("weights", "gradients", "optimizer"))
        moving = plan.activations + plan.logits + plan.working
        rows.append(
            {
                "estimate": plan.total,
                "measured": fullest["total"],
                "error_fraction": plan.total / fullest["total"] - 1,
                "activation_error_fraction": moving / (fullest["total"] - still) - 1,
                "measured_parts": {part: fullest[part] for part in ("weights", "gradients", "optimizer")},
            }
        )
    return rows


def on_ranks(ranks: int, whole: list[dict[str, Any]]) -> list[list[dict[str, int]]]:
    """Measure on processes of this machine."""
    port = common.free_port()
    context = mp.get_context("spawn")
    results = context.Queue()
    started = [
        context.Process(target=_rank, args=(rank, ranks, port, whole, results)) for rank in range(ranks)
    ]
    for process in started:
        process.start()
    found = dict(results.get(timeout=600) for _ in started)
    for process in started:
        process.join()
    return [found[rank] for rank in range(ranks)]


def _rank(rank: int, ranks: int, port: int, whole: list[dict[str, Any]], results: Any) -> None:
    os.environ.update(common.rank_environment(rank, ranks, port))
    from live_bytes import measure_all

    results.put((rank, measure_all(whole)))


def _worst(rows: list[dict[str, Any]], key: str) -> float:
    return max(abs(row[key]) for row in rows)


if __name__ == "__main__":
    main()
