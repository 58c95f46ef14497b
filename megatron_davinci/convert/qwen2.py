"""Qwen2: GQA with QKV bias, RMSNorm, SwiGLU, RoPE, tied or untied embeddings."""

from __future__ import annotations

from typing import Any

from megatron_davinci.convert.rules import GroupedQKV, Rule, Stacked
from megatron_davinci.errors import ConfigError

_HF, _MC = "model.layers.{layer}.", "decoder.layers.{layer}."


class Qwen2:
    """`Qwen2ForCausalLM` of transformers."""

    name = "qwen2"
    rules: tuple[Rule, ...] = (
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("vocab", "hidden")),
        Rule(
            _MC + "self_attention.linear_qkv.layer_norm_weight",
            (_HF + "input_layernorm.weight",),
            ("hidden",),
        ),
        Rule(
            _MC + "self_attention.linear_qkv.weight",
            tuple(_HF + f"self_attn.{x}_proj.weight" for x in "qkv"),
            ("qkv", "hidden"),
            GroupedQKV(),
        ),
        Rule(
            _MC + "self_attention.linear_qkv.bias",
            tuple(_HF + f"self_attn.{x}_proj.bias" for x in "qkv"),
            ("qkv",),
            GroupedQKV(),
        ),
        Rule(_MC + "self_attention.linear_proj.weight", (_HF + "self_attn.o_proj.weight",), ("hidden", "q")),
        Rule(
            _MC + "mlp.linear_fc1.layer_norm_weight", (_HF + "post_attention_layernorm.weight",), ("hidden",)
        ),
        Rule(
            _MC + "mlp.linear_fc1.weight",
            (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
            ("gate_up", "hidden"),
            Stacked(),
        ),
        Rule(_MC + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), ("hidden", "ffn")),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",)),
        Rule("output_layer.weight", ("lm_head.weight",), ("vocab", "hidden"), when="not tie_embeddings"),
    )

    def hf_config(self, model: dict[str, Any], eod_id: int | None, dtype: str) -> dict[str, Any]:
        """See `rules.Family.hf_config`.

        Raises:
            ConfigError: The model is not a Qwen2: it has no QKV bias, or QK-norm.
        """
        if model.get("qk_norm"):
            raise ConfigError(
                "This model cannot be exported as Qwen2.",
                where="model.qk_norm",
                found="true: queries and keys are normalised",
                expected="false; a Qwen2 has no weights for it, and without them it would be another model",
            )
        if not model["qkv_bias"]:
            raise ConfigError(
                "This model cannot be exported as Qwen2.",
                where="model.qkv_bias",
                found=False,
                expected="True: Qwen2's attention has biases on its query, key and value projections",
                do="train with model.qkv_bias=true",
            )
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": model["vocab_size"],
            "hidden_size": model["hidden_size"],
            "intermediate_size": model["ffn_hidden_size"],
            "num_hidden_layers": model["num_layers"],
            "num_attention_heads": model["num_attention_heads"],
            "num_key_value_heads": model["num_query_groups"],
            "head_dim": model["head_dim"] or model["hidden_size"] // model["num_attention_heads"],
            "max_position_embeddings": model["max_sequence_length"],
            "hidden_act": "silu",
            "rms_norm_eps": model["norm_epsilon"],
            # transformers 5 reads the second, earlier releases the first.
            "rope_theta": model["rope_base"],
            "rope_parameters": {"rope_type": "default", "rope_theta": model["rope_base"]},
            "tie_word_embeddings": model["tie_embeddings"],
            "initializer_range": model["init_std"],
            "attention_dropout": model["dropout"],
            "use_sliding_window": False,
            "use_cache": True,
            "torch_dtype": dtype,
            "bos_token_id": eod_id,
            "eos_token_id": eod_id,
        }
