"""What is named is not decayed, on every layout, and everything else as before."""

from __future__ import annotations

import pytest

from megatron_davinci.config import validate
from megatron_davinci.errors import ConfigError
from tests.config import small
from tests.ranks import run_ranks
from tests.stepping import built, start, take_all

DECAY = 0.5


def whole(spared, *, tied=True, **parallel):
    return small.settings(
        model={"num_layers": 2, "tie_embeddings": tied, "qk_norm": True},
        parallel={"device": "cpu", **parallel},
        optimizer={"no_weight_decay": spared, "weight_decay": DECAY},
        train={"precision": "fp32", "micro_batch_size": 2},
    )


def decayed(settings):
    """By how much one update without a gradient shrinks each weight: 1 - learning rate * its decay."""
    import torch
    from megatron.core import parallel_state

    from megatron_davinci.platform import distributed

    config, platform = start(settings)
    chunks, optimizer, _ = built(config, platform)
    names = {name: p for chunk in chunks for name, p in chunk.named_parameters()}
    before = {name: p.detach().clone() for name, p in names.items()}
    for p in names.values():
        p.main_grad.zero_()
    optimizer.step()
    rank = parallel_state.get_pipeline_model_parallel_rank()
    shrunk = {
        name: round(float((p / before[name])[before[name] != 0].mean()), 6)
        for name, p in names.items()
        if torch.any(before[name] != 0)
    }
    distributed.stop()
    return rank, shrunk


@pytest.mark.parametrize(
    ("spared", "tied", "parallel", "expected"),
    [
        ([], True, {}, set()),
        (["embedding"], True, {"pipeline": 2}, {"embedding.word_embeddings.weight", "output_layer.weight"}),
        (["output"], False, {}, {"output_layer.weight"}),
        (["embedding"], False, {}, {"embedding.word_embeddings.weight"}),
    ],
)
def test_what_is_named_keeps_its_size(spared, tied, parallel, expected):
    found = {}
    for _, shrunk in run_ranks(parallel.get("pipeline", 1), decayed, whole(spared, tied=tied, **parallel)):
        found |= shrunk
    spared_names = {name for name, ratio in found.items() if ratio == 1.0}
    assert spared_names - {name for name in found if "norm" in name} == expected
    assert set(found.values()) <= {1.0, 1 - 1e-2 * DECAY}
    assert all(found[name] == 1.0 for name in found if "norm" in name)


@pytest.mark.long
def test_layouts_agree_on_it():
    reference = run_ranks(1, take_all, {"a": whole(["embedding"])})[0]["a"]
    for taken in run_ranks(2, take_all, {"a": whole(["embedding"], pipeline=2)}):
        assert taken["a"].losses == pytest.approx(reference.losses, rel=1e-5)


@pytest.mark.parametrize(
    ("spared", "tied", "said"),
    [
        (["output"], True, "write embedding"),
        (["embedding", "embedding"], False, "twice"),
        (["embeddings"], False, "should be 'embedding' or 'output'"),
    ],
)
def test_what_is_not_there_cannot_be_spared(spared, tied, said):
    with pytest.raises(ConfigError, match=said):
        validate(whole(spared, tied=tied), "test")
