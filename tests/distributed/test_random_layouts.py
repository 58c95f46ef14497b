"""Random models on random layouts with random curricula compute what one rank computes."""

from __future__ import annotations

import json
import random

import pytest

from megatron_davinci.config import check_layout, validate
from tests.distributed.test_documents import write_documents
from tests.ranks import run_ranks
from tests.tiny import tiny_settings, train_here

STEPS = 12
SEEDS = range(16)


def factors(draw, world):
    """Tensor, pipeline, context and data ranks whose product is `world`."""
    parts = [1, 1, 1, 1]
    while world > 1:
        parts[draw.randrange(4)] *= 2
        world //= 2
    return parts


def composition(draw, total, parts, *, ends_may_be_empty):
    """`parts` numbers that add up to `total`; all but the first and the last are at least 1."""
    least = [int(not (ends_may_be_empty and place in (0, parts - 1))) for place in range(parts)]
    for _ in range(total - sum(least)):
        least[draw.randrange(parts)] += 1
    return least


def drawn(seed, root):
    """The settings of one rank, what the layout changes of them, and its ranks."""
    draw = random.Random(seed)
    world = draw.choice([2, 4, 4, 8])
    tensor, pipeline, context, data = factors(draw, world)
    virtual = draw.choice([1, 2]) if pipeline > 1 else 1
    groups = draw.choice([1, 2, 4])
    heads = max(tensor, groups) * draw.choice([1, 2])
    experts = None
    parallel = {"device": "cpu", "tensor": tensor, "pipeline": pipeline, "context": context}
    if draw.random() < 0.4:
        number = draw.choice([4, 8])
        experts = {
            "number": number,
            "top_k": draw.choice([1, 2]),
            "balance": draw.choice(["sequence", "micro_batch"]),
            "balance_coefficient": 0.05,
            "router_z_loss": draw.choice([0.0, 0.01]),
            "shared_ffn_hidden_size": draw.choice([None, 32]),
        }
        parallel["expert"] = draw.choice([e for e in (1, 2, 4) if (world // pipeline) % e == 0])
        left = world // pipeline // parallel["expert"]
        parallel["expert_tensor"] = draw.choice([e for e in (1, 2) if left % e == 0])
        parallel["expert_dispatcher"] = draw.choice(["alltoall", "allgather"])
    parallel["sequence"] = tensor > 1 and (experts is not None or draw.random() < 0.5)
    chunks = pipeline * virtual
    layers = draw.randint(max(chunks, 2), chunks + 3)
    if pipeline > 1:
        parallel["virtual_pipeline"] = virtual
        split = composition(draw, layers, chunks, ends_may_be_empty=chunks > 2)
        parallel["pipeline_layers"] = split
    parallel["distributed_optimizer"] = draw.random() < 0.8
    parallel["overlap_gradient_reduce"] = draw.random() < 0.3
    micro = draw.choice([1, 2])
    at_once = data * micro * (pipeline if virtual > 1 else 1)
    for number, name in enumerate(("a", "b")):
        write_documents(root / "data" / name, number)
    settings = tiny_settings(root)
    settings["model"] |= {
        "num_layers": layers,
        "hidden_size": 8 * heads,
        "num_attention_heads": heads,
        "num_query_groups": min(groups, heads),
        "ffn_hidden_size": 16 * draw.randint(1, 3),
        "tie_embeddings": draw.random() < 0.5,
        "experts": experts,
    }
    length = settings["data"]["sequence_length"]
    sizes = sorted({at_once * draw.randint(1, 3) for _ in range(draw.randint(1, 3))})
    ramp = [{"size": size, "steps": draw.randint(1, 4)} for size in sizes[:-1]] + [{"size": sizes[-1]}]
    first = sum(phase["size"] * phase.get("steps", 2) for phase in ramp)
    settings["curriculum"][0] |= {"tokens": first * length, "global_batch_size": ramp}
    settings["curriculum"][1] |= {"tokens": STEPS * sizes[-1] * length, "global_batch_size": sizes[-1]}
    for stage in settings["curriculum"]:
        if draw.random() < 0.5:
            stage["transforms"] = {"document_mask": True, "reset_positions": draw.random() < 0.5}
    settings["train"] |= {"micro_batch_size": micro, "stop_after_steps": STEPS}
    recompute = draw.choice([None, {"granularity": "selective", "modules": ["core_attn"]}])
    return settings, parallel, world, {"recompute": recompute} if recompute else {}


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_drawn_is_a_layout(seed, tmp_path):
    settings, parallel, world, train = drawn(seed, tmp_path)
    config = validate({**settings, "parallel": parallel, "train": {**settings["train"], **train}}, "drawn")
    assert check_layout(config, world).world == world


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_layout_equals_one_rank(seed, tmp_path):
    settings, parallel, world, train = drawn(seed, tmp_path)
    one = {**settings, "run": {"directory": str(tmp_path / "one"), "seed": seed}}
    run_ranks(1, train_here, one)
    many = {
        **settings,
        "run": {"directory": str(tmp_path / "many"), "seed": seed},
        "parallel": parallel,
        "train": {**settings["train"], **train},
    }
    run_ranks(world, train_here, many, timeout=600)
    found, expected = metrics(tmp_path / "many"), metrics(tmp_path / "one")
    for what in ("loss", "grad_norm"):
        deviations = [abs(x[what] - y[what]) / y[what] for x, y in zip(found, expected, strict=True)]
        assert len(deviations) == STEPS
        assert max(deviations) <= 1e-4, f"{what} of {parallel}"
