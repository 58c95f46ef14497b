"""The rules that the families share: a decoder of grouped-query attention, RMSNorm before each block, and SwiGLU."""

from __future__ import annotations

from megatron_davinci.convert.rules import GroupedQKV, Padded, Rule, Stacked

HF, MC = "model.layers.{layer}.", "decoder.layers.{layer}."

EMBEDDING = Rule(
    "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("vocab", "hidden"), Padded()
)
ATTENTION_NORM = Rule(
    MC + "self_attention.linear_qkv.layer_norm_weight", (HF + "input_layernorm.weight",), ("hidden",)
)
QKV = Rule(
    MC + "self_attention.linear_qkv.weight",
    tuple(HF + f"self_attn.{x}_proj.weight" for x in "qkv"),
    ("qkv", "hidden"),
    GroupedQKV(),
)
PROJECTION = Rule(
    MC + "self_attention.linear_proj.weight", (HF + "self_attn.o_proj.weight",), ("hidden", "q")
)
MLP_NORM = Rule(
    MC + "mlp.linear_fc1.layer_norm_weight", (HF + "post_attention_layernorm.weight",), ("hidden",)
)
GATE_UP = Rule(
    MC + "mlp.linear_fc1.weight",
    (HF + "mlp.gate_proj.weight", HF + "mlp.up_proj.weight"),
    ("gate_up", "hidden"),
    Stacked(),
)
DOWN = Rule(MC + "mlp.linear_fc2.weight", (HF + "mlp.down_proj.weight",), ("hidden", "ffn"))
FINAL_NORM = Rule("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",))
OUTPUT = Rule(
    "output_layer.weight", ("lm_head.weight",), ("vocab", "hidden"), Padded(), when="not tie_embeddings"
)


def qkv_bias(when: str | None = None) -> Rule:
    """Biases of the query, key and value projections."""
    return Rule(
        MC + "self_attention.linear_qkv.bias",
        tuple(HF + f"self_attn.{x}_proj.bias" for x in "qkv"),
        ("qkv",),
        GroupedQKV(),
        when=when,
    )


def decoder(*attention: Rule) -> tuple[Rule, ...]:
    """All rules, in the order in which their tensors are used.

    Args:
        attention: What a family's attention has besides, behind its query, key and value projections.
    """
    return (
        EMBEDDING,
        ATTENTION_NORM,
        QKV,
        *attention,
        PROJECTION,
        MLP_NORM,
        GATE_UP,
        DOWN,
        FINAL_NORM,
        OUTPUT,
    )
