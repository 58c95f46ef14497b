"""Levers that contradict each other are refused with the key and what to write instead."""

from __future__ import annotations

import pytest

from megatron_davinci.config import validate
from megatron_davinci.errors import ConfigError
from tests.config import small


def refusal(**changes):
    with pytest.raises(ConfigError) as caught:
        validate(small.settings(**changes), "test")
    return str(caught.value)


def recompute(**keys):
    return {"train": {"precision": "fp32", "recompute": keys}}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"granularity": "selective"}, "needs modules"),
        ({"modules": ["mlp"]}, "granularity: selective"),
        ({"granularity": "full", "modules": ["mlp"]}, "found granularity: full"),
        ({"granularity": "selective", "modules": ["mlp", "mlp"]}, "twice"),
        ({"granularity": "selective", "modules": ["mpl"]}, "'mpl'"),
        ({"granularity": "selective", "modules": ["mlp"], "layers": 2}, "layers acts with granularity: full"),
        ({"granularity": "selective", "modules": ["moe"]}, "write mlp"),
        ({"layers": 2}, "layers acts with granularity: full"),
        ({"granularity": "full", "layers": 0}, "greater than or equal to 1"),
        ({"granularity": "full", "layers": 3}, "more than any pipeline stage has"),
        ({"granularity": "full", "layers": 3, "method": "block"}, "more than any pipeline stage has"),
    ],
)
def test_recomputation_that_would_not_act_is_refused(keys, said):
    text = refusal(**recompute(**keys))
    assert "train.recompute" in text and said in text


def test_recomputed_runs_of_layers_are_equal():
    keys = recompute(granularity="full", layers=3)
    assert "does not divide the layers of a pipeline stage (4)" in refusal(
        model={"num_layers": 8}, parallel={"pipeline": 2}, **keys
    )
    keys["train"]["recompute"]["method"] = "block"
    assert validate(small.settings(model={"num_layers": 8}, parallel={"pipeline": 2}, **keys), "test")


def test_contradictions_of_several_sections_are_listed_together():
    text = refusal(data={"sequence_length": 32}, **recompute(granularity="full", layers=5))
    assert "exceeds model.max_sequence_length" in text and "train.recompute.layers (5)" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel": {"overlap_parameter_gather": True}}, "overlap_gradient_reduce: true"),
        (
            {"parallel": {"overlap_parameter_gather": True, "overlap_gradient_reduce": True,
                          "distributed_optimizer": False}},
            "needs distributed_optimizer: true",
        ),
        ({"parallel": {"optimizer_instances": 2, "distributed_optimizer": False}}, "optimizer_instances shards"),
        ({"parallel": {"overlap_tensor": True}}, "needs sequence: true"),
        ({"optimizer": {"cpu_offload": 0.5}}, "found precision: fp32"),
        ({"optimizer": {"moments": "fp8"}, "backends": {"optimizer": "torch"}}, "davinci only"),
        ({"optimizer": {"moments": "fp8"}, "parallel": {"distributed_optimizer": False}}, "moments: fp8 needs"),
        ({"optimizer": {"cpu_offload": 0.5}, "backends": {"optimizer": "davinci"}}, "an AdamW of its own"),
        ({"optimizer": {"cpu_offload": 1.5}}, "less than or equal to 1"),
        ({"train": {"low_precision": {"parameters": True}}}, "needs a recipe"),
        ({"train": {"precision": "bf16", "low_precision": {"recipe": "fp8"}}}, "'delayed', 'current', 'block'"),
        ({"train": {"precision": "fp32", "low_precision": {"recipe": "current", "backend": "transformer_engine"}}},
         "beside bf16"),
        ({"train": {"precision": "bf16", "low_precision": {"recipe": "mxfp8"}}}, "tokens of a micro-batch on a rank"),
        ({"train": {"cuda_graphs": True, "recompute": {"granularity": "full"}}}, "runs them again"),
        ({"train": {"cuda_graphs": True}, "model": {"dropout": 0.1}}, "cannot capture model.dropout"),
        ({"train": {"cuda_graphs": True}, "evaluation": {"document_mask": True}}, "cannot capture a document mask"),
    ],
)  # fmt: skip
def test_levers_that_megatron_core_forbids_together_are_refused(changes, said):
    assert said in refusal(**changes)


def test_what_fp8_forbids_is_listed_at_once():
    text = refusal(
        model={"hidden_size": 36, "ffn_hidden_size": 40, "head_dim": 8},
        backends={"layers": "local"},
        train={"precision": "fp32", "low_precision": {"recipe": "delayed", "backend": "transformer_engine"},
               "recompute": {"granularity": "selective", "modules": ["layernorm"]}},
    )  # fmt: skip
    for said in ("beside bf16", "backends.layers: local", "cannot recompute under", "model.hidden_size (36)",
                 "model.ffn_hidden_size / parallel.tensor (40)"):  # fmt: skip
        assert said in text


def test_instances_divide_the_data_parallel_ranks():
    from megatron_davinci.config import check_layout

    config = validate(small.settings(parallel={"optimizer_instances": 2}), "test")
    assert check_layout(config, 2)
    with pytest.raises(
        ConfigError, match=r"data- and context-parallel ranks \(1\) is not a multiple of parallel.opt"
    ):
        check_layout(config, 1)


def test_what_a_snapshot_would_not_hold_is_refused():
    snapshots = {"every_steps": 10}
    offloaded = {"train": {"precision": "bf16"}, "optimizer": {"cpu_offload": 1.0}, "snapshots": snapshots}
    assert "found optimizer.cpu_offload" in refusal(**offloaded)
    fp8 = {"train": {"precision": "bf16", "low_precision": {"recipe": "current"}}, "snapshots": snapshots}
    assert "holds no scales of FP8 layers; found train.low_precision.recipe: current" in refusal(**fp8)
    validate(small.settings(snapshots=snapshots), "test")
