"""Presets are the models that they are named after, and the counted parameters are the built ones."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_davinci.config import validate
from megatron_davinci.config.model import PRESETS, ModelConfig
from megatron_davinci.errors import ConfigError
from tests.config import small
from tests.ranks import run_ranks


def test_davinci_3b_is_table_4_of_the_report():
    model = ModelConfig.model_validate({"preset": "davinci-3b"})
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size) == (36, 2048, 11008)
    assert (model.num_attention_heads, model.num_query_groups, model.kv_channels) == (16, 2, 128)
    assert (model.vocab_size, model.max_sequence_length) == (151936, 4096)
    assert model.parameters() == 3_085_938_688
    # The report's "~3.09B" says that the embeddings are tied: untied they would be 3.4B.
    assert model.model_copy(update={"tie_embeddings": False}).parameters() == 3_085_938_688 + 151936 * 2048


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_whole_and_its_name_is_about_its_size(name):
    model = ModelConfig.model_validate({"preset": name})
    millions = {"davinci-3b": 3086, "150m": 150, "tiny": 4, "tiny-moe": 11}[name]
    assert model.parameters() / 1e6 == pytest.approx(millions, rel=0.1)
    assert model.parameters() - model.parameters(embeddings=False) == model.vocab_size * model.hidden_size


def test_what_is_written_beside_a_preset_wins():
    model = ModelConfig.model_validate({"preset": "tiny", "num_layers": 7})
    assert (model.num_layers, model.hidden_size) == (7, PRESETS["tiny"]["hidden_size"])


def test_an_unknown_preset_names_the_ones_there_are():
    with pytest.raises(ConfigError, match="davinci-3b"):
        validate(small.settings(model={"preset": "davinci-4b"}), "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_query_groups": 3},
            "num_attention_heads \\(4\\) is not a multiple of num_query_groups \\(3\\)",
        ),
        ({"hidden_size": 34}, "hidden_size \\(34\\) is not a multiple of num_attention_heads"),
        ({"head_dim": 5}, "head_dim \\(5\\) is odd"),
    ],
)
def test_heads_that_do_not_divide_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        validate(small.settings(model=change), "test")


def test_flops_are_counted_as_a_person_counts_them():
    # 6 for each weight of a matrix product; scores and values causally: 6 * s * heads * head_dim a layer.
    model = ModelConfig.model_validate(small.settings()["model"])
    layer = 32 * (4 + 2 + 2) * 8 + 4 * 8 * 32 + 3 * 32 * 48
    assert model.flops_per_token(16) == 6 * (2 * layer + 64 * 32) + 6 * 2 * 4 * 8 * 16


sizes = st.fixed_dictionaries(
    {
        "num_layers": st.integers(1, 3),
        "groups": st.integers(1, 3),
        "per_group": st.integers(1, 3),
        "head_dim": st.sampled_from([None, 2, 6]),
        "ffn_hidden_size": st.integers(1, 40),
        "vocab_size": st.integers(1, 100),
        "qkv_bias": st.booleans(),
        "tie_embeddings": st.booleans(),
    }
)


def built_counts_agree(examples: int) -> int:
    """On a rank: hypothesis draws the sizes here, so that one process builds every model."""
    from megatron_davinci.model.build import build_model
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose

    platform = choose("cpu", threads=1)
    distributed.start(platform)
    tried = 0

    @settings(max_examples=examples, deadline=None, database=None)
    @given(drawn=sizes)
    def check(drawn):
        nonlocal tried
        tried += 1
        groups, per_group = drawn.pop("groups"), drawn.pop("per_group")
        heads = groups * per_group
        drawn |= {"num_query_groups": groups, "num_attention_heads": heads, "hidden_size": heads * 4}
        config = validate(small.settings(model=drawn), "test")
        (model,) = build_model(config, platform)
        assert sum(p.numel() for p in model.parameters()) == config.model.parameters(), drawn
        kept = {name: p.numel() for name, p in model.named_parameters() if "embedding" not in name}
        kept.pop("output_layer.weight", None)
        assert sum(kept.values()) == config.model.parameters(embeddings=False), drawn

    try:
        check()
    finally:
        distributed.stop()
    return tried


def test_the_count_is_that_of_the_model_that_is_built():
    assert run_ranks(1, built_counts_agree, 25) == [25]


@pytest.mark.parametrize("preset", [["tiny"], {"name": "tiny"}])
def test_what_is_no_name_is_an_error_of_its_field(preset):
    with pytest.raises(ValidationError, match="preset"):
        ModelConfig.model_validate({"preset": preset})
