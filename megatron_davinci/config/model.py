"""The model: a Qwen2-style decoder (GQA, QKV bias, RMSNorm, SwiGLU, RoPE), and its presets."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_davinci.config.experts import ExpertsConfig
from megatron_davinci.config.rope import RopeScaling
from megatron_davinci.config.section import Section

PRESETS: dict[str, dict[str, Any]] = {
    # Table 4 of the daVinci-LLM report (arXiv 2603.27164). Its "~3.09B parameters" hold only with tied
    # embeddings (3.086B); QKV bias follows from the Qwen2 lineage and is not stated there.
    "davinci-3b": {
        "num_layers": 36,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_query_groups": 2,
        "ffn_hidden_size": 11008,
        "vocab_size": 151936,
        "max_sequence_length": 4096,
        "rope_base": 10000.0,
        "tie_embeddings": True,
    },
    "150m": {
        "num_layers": 16,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_query_groups": 2,
        "ffn_hidden_size": 2048,
        "vocab_size": 49152,
        "max_sequence_length": 2048,
        "rope_base": 10000.0,
        "tie_embeddings": True,
    },
    "tiny": {
        "num_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 704,
        "vocab_size": 4096,
        "max_sequence_length": 256,
        "rope_base": 10000.0,
        "tie_embeddings": True,
    },
    # 11.3M parameters, of which 4.2M work on a token.
    "tiny-moe": {
        "num_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 384,
        "vocab_size": 4096,
        "max_sequence_length": 256,
        "rope_base": 10000.0,
        "tie_embeddings": True,
        "experts": {"number": 8, "top_k": 2},
    },
}


class ModelConfig(Section):
    """Sizes and switches of the model. `preset` fills what is not written beside it."""

    preset: Literal["davinci-3b", "150m", "tiny", "tiny-moe"] | None = Field(
        default=None, description="Sizes to begin with; with it, no size need be written"
    )
    num_layers: int = Field(gt=0, description="Transformer layers")
    hidden_size: int = Field(gt=0, description="Channels of the residual stream")
    num_attention_heads: int = Field(gt=0, description="Query heads")
    num_query_groups: int = Field(gt=0, description="Key/value heads (GQA)")
    ffn_hidden_size: int = Field(
        gt=0, description="Channels between an MLP's projections (SwiGLU), of each expert too"
    )
    experts: ExpertsConfig | None = Field(
        default=None, description="Mixture of experts; null for one MLP in each layer"
    )
    vocab_size: int = Field(gt=0, description="Rows of the embedding; at least the tokenizer's")
    vocab_padding: int = Field(
        default=0,
        ge=0,
        description="How many of them, at the end, are no token's: there so that tensor ranks divide the vocabulary, "
        "out of the softmax, and left out of exports",
    )
    max_sequence_length: int = Field(
        gt=0, description="Written to the exported config; RoPE itself has no table"
    )
    head_dim: int | None = Field(default=None, gt=0, description="Default: hidden_size / num_attention_heads")
    qkv_bias: bool = Field(default=True, description="Biases on query, key and value projections (Qwen2)")
    qk_norm: bool = Field(default=False, description="RMSNorm of queries and keys, before they are rotated")
    qk_norm_scope: Literal["head", "all_heads"] = Field(
        default="head",
        description="What one norm of `qk_norm` spans: each head by itself (Qwen3), or all heads together (OLMo 2)",
    )
    norm_placement: Literal["pre", "post"] = Field(
        default="pre",
        description="pre: a norm before each block; post: behind it, before it is added to the residual (OLMo 2)",
    )
    tie_embeddings: bool = Field(default=True, description="One matrix for embedding and output")
    rope_base: float = Field(default=10000.0, gt=0, description="Base of RoPE's wavelengths")
    rope_scaling: RopeScaling | None = Field(
        default=None, description="Stretched wavelengths, as in Llama 3.1; null for none"
    )
    norm_epsilon: float = Field(default=1e-6, gt=0, description="Added to RMSNorm's mean square")
    init_std: float = Field(
        default=0.02,
        gt=0,
        description="Standard deviation of initial weights; over sqrt(2 * layers) where they end a residual branch",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="On attention weights and residual branches")
    family: Literal["qwen2", "llama", "qwen3", "mistral", "olmo2"] | None = Field(
        default=None,
        description="What exports to Hugging Face are written as; default: olmo2 with norms behind the blocks, qwen3 "
        "with qk_norm, qwen2 with qkv_bias, llama with none of them",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        if isinstance(preset, str) and preset in PRESETS:
            return {**PRESETS[preset], **values}
        return values

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_query_groups ({self.num_query_groups}): a key/value head serves a whole number of heads"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads}): change one, or write head_dim"
            )
        if self.vocab_padding >= self.vocab_size:
            raise ValueError(
                f"vocab_padding ({self.vocab_padding}) leaves no token of vocab_size ({self.vocab_size})"
            )
        if self.qk_norm_scope == "all_heads" and not self.qk_norm:
            raise ValueError("qk_norm_scope (all_heads) says what a norm spans; it needs qk_norm: true")
        if self.norm_placement == "post" and self.experts is not None:
            raise ValueError("norm_placement (post) is there for layers of one MLP, not of experts")
        if self.kv_channels % 2:
            raise ValueError(f"head_dim ({self.kv_channels}) is odd: RoPE rotates pairs of channels")
        return self

    @property
    def kv_channels(self) -> int:
        """Channels of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def tokens(self) -> int:
        """Token ids that the model knows: the vocabulary without its padding."""
        return self.vocab_size - self.vocab_padding

    def expert_parameters(self) -> int:
        """Count the parameters of all experts of a layer, the router and the shared expert left out."""
        return (
            0 if self.experts is None else self.experts.number * 3 * self.hidden_size * self.ffn_hidden_size
        )

    def mlp_parameters(self, *, active: bool = False) -> int:
        """Count the parameters of a layer's MLP, or of its experts, the router and the shared expert.

        Args:
            active: Count those only that one token is multiplied with.
        """
        h, f, experts = self.hidden_size, self.ffn_hidden_size, self.experts
        if experts is None:
            return 3 * h * f
        used = experts.top_k if active else experts.number
        return used * 3 * h * f + experts.number * h + 3 * h * (experts.shared_ffn_hidden_size or 0)

    def qk_norm_parameters(self) -> int:
        """Count the weights of a layer's norms of queries and keys."""
        heads = 2 if self.qk_norm_scope == "head" else self.num_attention_heads + self.num_query_groups
        return heads * self.kv_channels if self.qk_norm else 0

    def parameters(self, *, embeddings: bool = True, active: bool = False) -> int:
        """Count the trainable parameters.

        Args:
            embeddings: Count the embedding and output matrices too.
            active: Count those experts only that one token goes through.
        """
        h, d = self.hidden_size, self.kv_channels
        qkv = (self.num_attention_heads + 2 * self.num_query_groups) * d
        attention = h * qkv + (qkv if self.qkv_bias else 0) + self.num_attention_heads * d * h
        layer = attention + self.mlp_parameters(active=active) + 2 * h + self.qk_norm_parameters()
        total = self.num_layers * layer + h
        if embeddings:
            total += (1 if self.tie_embeddings else 2) * self.vocab_size * h
        return total

    def flops_per_token(self, sequence_length: int) -> int:
        """Count the floating-point operations that training spends on a token, forward and backward.

        Matrix products only: 6 for each weight that multiplies (the output matrix included, the embedding
        look-up not; of experts those that a token goes through), and for attention scores and values
        6 * layers * heads * head_dim * sequence_length, the *causal* convention, which counts only the half of the
        score matrix that is used.
        """
        h, d = self.hidden_size, self.kv_channels
        qkv = (self.num_attention_heads + 2 * self.num_query_groups) * d
        layer = h * qkv + self.num_attention_heads * d * h + self.mlp_parameters(active=True)
        weights = self.num_layers * layer + self.vocab_size * h
        attention = self.num_layers * self.num_attention_heads * d * sequence_length
        return 6 * weights + 6 * attention
