"""What Muon costs each data-parallel rank: its parameters dealt among the ranks, against all of them on each.

Ranks with a core each build the same model twice, with `parallel.distributed_optimizer` on and off, give both the
same gradients, and take updates in turn. The time is the slowest rank's, from gradients that are there to weights
that are everywhere; the state is the fullest rank's. What both come to is compared to the bit. Beside them: how even
the deal is for the 3B model of the report, by arithmetic over its parameters, with 8 and with 64 ranks.

figures: dealt_update_seconds, kept_update_seconds, dealt_update_fraction, dealt_state_bytes, kept_state_bytes,
    dealt_state_fraction, equal_weights_fraction, updates, fullest_of_8_times_even, fullest_of_64_times_even
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common

KINDS = {"dealt": True, "kept": False}
REPORT = Path(__file__).parent.parent / "examples" / "davinci_3b" / "config.yaml"


def main() -> None:
    """Measure and report."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--updates", type=int, default=8, help="of each kind; the first is not counted")
    parser.add_argument("--task", help="for the ranks that this starts")
    arguments = parser.parse_args()
    if arguments.task:
        rank(json.loads(arguments.task))
        return
    found = start(vars(arguments))
    seconds = {
        kind: statistics.median(map(max, zip(*(one[kind]["seconds"][1:] for one in found), strict=True)))
        for kind in KINDS
    }
    state = {kind: max(one[kind]["state"] for one in found) for kind in KINDS}
    equal = [one["dealt"]["weights"] == one["kept"]["weights"] for one in found]
    common.write(
        arguments.json,
        {
            "dealt_update_seconds": seconds["dealt"],
            "kept_update_seconds": seconds["kept"],
            "dealt_update_fraction": seconds["dealt"] / seconds["kept"],
            "dealt_state_bytes": state["dealt"],
            "kept_state_bytes": state["kept"],
            "dealt_state_fraction": state["dealt"] / state["kept"],
            "equal_weights_fraction": statistics.mean(equal),
            "updates": arguments.updates - 1,
            **{f"fullest_of_{ranks}_times_even": fullest(ranks) for ranks in (8, 64)},
        },
        {"name": "Muon with all of its state on each rank", "ranks": arguments.ranks},
    )


def fullest(ranks: int) -> float:
    """What the rank with most parameters of the report's model has, by an even share."""
    from megatron_davinci.config import load_config
    from megatron_davinci.convert.families import family_of
    from megatron_davinci.optim.dealt import owners

    model = load_config(REPORT).model.model_dump(mode="json")
    sizes = []
    for rule in family_of(model).rules_of(model):
        shape = rule.stored_shape(model)
        # A layer's are stored as one tensor of all layers.
        layers = shape[0] if rule.stored.startswith("decoder.layers.") else 1
        sizes += [math.prod(shape) // layers] * layers
    held = [0] * ranks
    for size, owner in zip(sizes, owners(sizes, ranks), strict=True):
        held[owner] += size
    return max(held) * ranks / sum(sizes)


def settings(task: dict[str, Any], dealt: bool) -> dict[str, Any]:
    """Of a run that only its model and optimizer are built of."""
    hidden = task["hidden_size"]
    return {
        "run": {"directory": "unused", "seed": task["seed"]},
        "model": {
            "num_layers": task["layers"], "hidden_size": hidden, "num_attention_heads": hidden // 64,
            "num_query_groups": max(1, hidden // 256), "ffn_hidden_size": 3 * hidden,
            "vocab_size": 8192, "max_sequence_length": 128,
        },
        "parallel": {"device": "cpu", "distributed_optimizer": dealt},
        # Not clipped: the norm is summed in another order, and weights could then not be the same to the bit.
        "optimizer": {"kind": "muon", "clip_grad_norm": 0.0},
        "train": {"precision": "bf16"},
        "data": {"sequence_length": 128, "sources": {"a": {"path": "unused"}}},
        "curriculum": [
            {
                "name": "one", "tokens": "1M", "global_batch_size": 8, "mixture": {"a": 1.0},
                "learning_rate": {"peak": 1e-3},
            }
        ],
    }  # fmt: skip


def start(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Run `rank` on all ranks; what each found."""
    task, port = {**task, "json": None, "task": None}, common.free_port()
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--task", json.dumps(task)],
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                **common.rank_environment(number, task["ranks"], port),
                "OMP_NUM_THREADS": "1",
            },
        )
        for number in range(task["ranks"])
    ]
    said = [one.communicate()[0] for one in started]
    if any(one.returncode for one in started):
        raise SystemExit("a rank failed; what it said is above")
    return [json.loads(text.splitlines()[-1]) for text in said]


def rank(task: dict[str, Any]) -> None:
    """Update both, and print what one rank found."""
    import torch
    import torch.distributed as dist

    from megatron_davinci.config import validate
    from megatron_davinci.model.build import build_model
    from megatron_davinci.optim.build import build_optimizer, set_hyperparameters
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose
    from megatron_davinci.train.step import wrap_model

    torch.set_num_threads(1)
    configs = {kind: validate(settings(task, dealt), "dealt_muon.py") for kind, dealt in KINDS.items()}
    platform = choose("cpu", threads=1)
    distributed.start(platform, **configs["dealt"].parallel.groups)
    built, found = {}, {}
    for kind, config in configs.items():
        chunks = wrap_model(build_model(config, platform), config)
        optimizer = build_optimizer(config, chunks)
        set_hyperparameters(optimizer, learning_rate=1e-3, weight_decay=0.1)
        built[kind] = chunks, optimizer
        inner = optimizer.chained_optimizers[0].optimizer
        state = sum(t.nbytes for one in inner.state.values() for t in one.values())
        main = sum(p.nbytes for group in inner.param_groups for p in group["params"])
        found[kind] = {"seconds": [], "state": state + main}
    for number in range(task["updates"]):
        for kind, (chunks, optimizer) in built.items():
            generator = torch.Generator().manual_seed(1000 * task["seed"] + number)
            for chunk in chunks:
                for p in chunk.parameters():
                    p.main_grad.copy_(torch.randn(p.shape, generator=generator))
            dist.barrier()
            begin = time.perf_counter()
            optimizer.step()
            dist.barrier()
            found[kind]["seconds"].append(time.perf_counter() - begin)
    for kind, (chunks, _) in built.items():
        digest = hashlib.sha256()
        for chunk in chunks:
            for p in chunk.parameters():
                digest.update(p.detach().view(torch.int16).numpy().tobytes())
        found[kind]["weights"] = digest.hexdigest()
    distributed.stop()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
