"""Products of few bits that nobody would compute, or not where they are asked for, are refused."""

from __future__ import annotations

import pytest

from megatron_davinci.config import validate
from megatron_davinci.errors import ConfigError, EnvironmentProblem
from megatron_davinci.platform.backends import choose_backends
from tests.config import small
from tests.ranks import run_ranks

SIZES = {"hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 4}


def settings(low, *, precision="fp32", model=None, **sections):
    return small.settings(
        model={**SIZES, **(model or {})},
        train={"precision": precision, "low_precision": low, **sections.pop("train", {})},
        **sections,
    )


@pytest.mark.parametrize(
    ("low", "changes", "said"),
    [
        ({"recipe": "bits", "backend": "transformer_engine"}, {}, "transformer_engine has no recipe: bits"),
        ({"recipe": "bits"}, {"model": {"experts": {"number": 4}}}, "recipe: bits is not in experts"),
        ({"recipe": "bits"}, {"backends": {"layers": "transformer_engine"}}, "recipe: bits is in our own layers"),
        ({"recipe": "bits"}, {"train": {"cuda_graphs": True}}, "cannot capture train.low_precision.recipe: bits"),
        ({"recipe": "bits", "keep_codes": True}, {}, "found recipe: bits"),
        ({"recipe": "current", "tail_tokens": 256}, {}, "is all of the curriculum's 256 tokens"),
        ({"recipe": "mxfp8", "keep_codes": True}, {}, "found recipe: mxfp8"),
        ({"recipe": "current", "backend": "transformer_engine", "keep_codes": True}, {"precision": "bf16"},
         "keep_codes is of backend: native; found backend: transformer_engine"),
        ({"watch_every_steps": 5}, {}, "watch_every_steps acts with a recipe; found recipe: none"),
        ({"recipe": "current", "backend": "transformer_engine", "watch_every_steps": 5}, {"precision": "bf16"},
         "watch_every_steps is of backend: native and emulate; found backend: transformer_engine"),
    ],
)  # fmt: skip
def test_what_would_not_be_multiplied_by_the_recipe_is_refused(low, changes, said):
    with pytest.raises(ConfigError) as caught:
        validate(settings(low, **changes), "test")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("low", "said"),
    [
        ({"recipe": "current", "keep_codes": True}, "keep_codes"),
        ({"recipe": "nvfp4", "nvfp4": {"hadamard": False}}, "low_precision.nvfp4"),
        ({"recipe": "delayed", "keep_last_layers": 1}, "recipe: delayed"),
    ],
)
def test_what_transformer_engine_would_not_do_is_in_our_own_layers(low, said):
    config = validate(settings(low), "test")
    assert choose_backends(on_cuda=False, **config.backend_arguments()).layers.why.endswith(said)


def build(whole):
    from tests.stepping import built, start

    return len(built(*start(whole)))


def test_where_auto_comes_to_our_products_experts_are_refused_as_the_model_is_built():
    whole = settings({"recipe": "current"}, model={"experts": {"number": 4}})
    validate(whole, "test")  # Transformer Engine's are in experts
    with pytest.raises(EnvironmentProblem, match="backend: emulate is not in experts"):
        run_ranks(1, build, whole)
