"""The model that a Megatron-LM checkpoint's arguments describe, in our words; or why it cannot be built here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_davinci.config.model import ModelConfig
from megatron_davinci.errors import CheckpointError, ConfigError
from megatron_davinci.platform.safe_pickle import Named

# What an argument must be, and what it says if it is not. Arguments that are absent have Megatron-LM's default.
_MUST: tuple[tuple[str, tuple[Any, ...], Any, str], ...] = (
    ("normalization", ("RMSNorm",), "LayerNorm", "the model has RMSNorm"),
    ("swiglu", (True,), False, "the model has SwiGLU"),
    ("position_embedding_type", ("rope",), "learned_absolute", "the model has RoPE"),
    ("rotary_percent", (1, 1.0), 1.0, "RoPE rotates all channels"),
    ("rotary_interleaved", (False, None), False, "RoPE rotates the halves of a head"),
    ("use_rope_scaling", (False, None), False, "RoPE is not scaled"),
    ("rotary_seq_len_interpolation_factor", (None, 1, 1.0), None, "RoPE is not scaled"),
    ("no_rope_freq", (None,), None, "all layers have RoPE"),
    ("softmax_scale", (None,), None, "attention is scaled by the root of a head's size"),
    ("glu_linear_offset", (None, 0, 0.0), 0.0, "SwiGLU has no offset"),
    ("activation_func_clamp_value", (None,), None, "SwiGLU is not clamped"),
    ("add_bias_linear", (False,), True, "only queries, keys and values may have biases"),
    ("apply_layernorm_1p", (False, None), False, "a norm's weight is its factor"),
    ("apply_residual_connection_post_layernorm", (False, None), False, "norms come before what they feed"),
    ("qk_layernorm", (False, None), False, "queries and keys are not normalised in a checkpoint that is imported"),
    ("multi_latent_attention", (False, None), False, "attention is grouped-query attention"),
    ("num_experts", (None, 0), None, "layers with experts are not imported"),
    ("mtp_num_layers", (None, 0), None, "one token is predicted"),
    ("window_size", (None,), None, "attention sees all that came before"),
    ("heterogeneous_layers_config_path", (None,), None, "all layers are alike"),
    ("softmax_type", ("vanilla", None), "vanilla", "attention's softmax is the plain one"),
    ("scale_embeddings_by_hidden_size", (False, None), False, "embeddings are not scaled"),
)  # fmt: skip


def model_of(arguments: dict[str, Any], where: Path, vocabulary: int | None) -> dict[str, Any]:
    """The `model` section of our configuration.

    Args:
        arguments: Megatron-LM's, by name.
        where: The file that they are from, for messages.
        vocabulary: Rows of the stored embedding: the vocabulary as it was padded.

    Raises:
        ConfigError: The model is another; every difference is listed.
        CheckpointError: A size is missing or is no number.
    """
    strange = [
        f"{name} = {_said(value)}: {why}"
        for name, allowed, default, why in _MUST
        if (value := arguments.get(name, default)) not in allowed
    ]
    if strange:
        raise ConfigError(
            "Megatron-LM's checkpoint is of a model that cannot be built here.",
            where=where,
            found="\n".join(strange),
            expected="a Llama or a Qwen2: RMSNorm, SwiGLU, RoPE, grouped queries",
            do="see docs/concepts/model.md",
        )
    heads = arguments.get("num_attention_heads")
    hidden = arguments.get("hidden_size")
    groups = arguments.get("num_query_groups") if arguments.get("group_query_attention") else heads
    channels = arguments.get("kv_channels")
    plain = isinstance(heads, int) and isinstance(hidden, int) and heads and channels == hidden // heads
    vocabulary = vocabulary or arguments.get("padded_vocab_size")
    section = {
        "num_layers": arguments.get("num_layers"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "ffn_hidden_size": arguments.get("ffn_hidden_size"),
        "vocab_size": vocabulary,
        "max_sequence_length": arguments.get("max_position_embeddings") or arguments.get("seq_length"),
        "head_dim": None if plain else channels,
        "qkv_bias": bool(arguments.get("add_qkv_bias", False)),
        "tie_embeddings": not arguments.get("untie_embeddings_and_output_weights", False),
        "rope_base": float(arguments.get("rotary_base", 10000)),
        "norm_epsilon": arguments.get("norm_epsilon", arguments.get("layernorm_epsilon", 1e-5)),
        "init_std": arguments.get("init_method_std", 0.02),
    }
    try:
        return ModelConfig.model_validate(section).model_dump(mode="json")
    except ValidationError as error:
        raise CheckpointError(
            "The arguments of Megatron-LM's checkpoint do not describe a model.",
            where=where,
            found="\n".join(
                f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False)
            ),
        ) from error


def _said(value: Any) -> str:
    return value.name if isinstance(value, Named) else repr(value)
