"""Llama: as Qwen2, without biases on query, key and value projections."""

from __future__ import annotations

from typing import Any

from megatron_davinci.convert.qwen2 import Qwen2
from megatron_davinci.convert.rules import Family, Rule
from megatron_davinci.errors import ConfigError


class Llama:
    """`LlamaForCausalLM` of transformers."""

    name = "llama"
    rules: tuple[Rule, ...] = tuple(
        rule for rule in Qwen2.rules if not rule.mcore.endswith("linear_qkv.bias")
    )

    def hf_config(self, model: dict[str, Any], eod_id: int | None, dtype: str) -> dict[str, Any]:
        """See `rules.Family.hf_config`.

        Raises:
            ConfigError: The model is not a Llama: it has QKV bias.
        """
        if model["qkv_bias"]:
            raise ConfigError(
                "This model cannot be exported as Llama.",
                where="model.qkv_bias",
                found=True,
                expected="False: Llama's attention has biases on all of its projections, or on none",
                do="export it as Qwen2",
            )
        config = Qwen2().hf_config({**model, "qkv_bias": True}, eod_id, dtype)
        del config["use_sliding_window"]
        return config | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "mlp_bias": False,
        }


def family_of(model: dict[str, Any]) -> Family:
    """The family whose models are built as this one is, from the `model` section of its configuration."""
    return Qwen2() if model["qkv_bias"] else Llama()
