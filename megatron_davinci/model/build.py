"""From the run configuration to this rank's part of the model."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megatron_davinci.config import RunConfig
from megatron_davinci.kernels.ways import require_kernels
from megatron_davinci.model.experts import expert_settings, mark_experts
from megatron_davinci.model.gpt import GPT
from megatron_davinci.model.initialize import initialize
from megatron_davinci.model.levers import lever_settings, start_tensor_overlap
from megatron_davinci.model.precision_state import LowPrecision
from megatron_davinci.model.spec import block_spec
from megatron_davinci.platform.backends import choose_backends
from megatron_davinci.platform.device import Platform

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(
    config: RunConfig, *, transformer_engine: bool = False, fused_weight_gradient: bool = False
) -> TransformerConfig:
    """Say the configuration in Megatron-Core's words.

    Args:
        config: The run configuration.
        transformer_engine: Whose layers are built.
        fused_weight_gradient: Whether products add to the fp32 sums of weight gradients.
    """
    model, parallel = config.model, config.parallel
    interleaved = parallel.virtual_pipeline > 1
    dtype = DTYPES[config.train.precision]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        pipeline_model_parallel_layout=_pipeline_layout(config),
        # Without overlap an interleaved pipeline of two ranks mixes up its messages and says nothing: two sends and
        # two receives between the same pair are then one batch.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=config.train.precision == "bf16",
        # `initialize` draws the weights, the same on every layout. Megatron-Core still has to go through its own
        # initialisation on the CPU: that is where it marks which weights are split over tensor ranks.
        use_cpu_initialization=not config.train.low_precision.parameters,  # there is no FP8 on a CPU
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        # The loss is a sum over tokens divided by their number in the global batch: with a mean of
        # means the gradient would depend on how the batch is cut.
        calculate_per_token_loss=True,
        # Fusions need torch.compile or Transformer Engine; the precision and kernels rooms turn them on.
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=fused_weight_gradient,
        **lever_settings(config, transformer_engine=transformer_engine),
        **expert_settings(config, grouped=transformer_engine),
    )


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _pipeline_layout(config: RunConfig) -> list[list[str]] | None:
    """Uneven chunks as Megatron-Core lists them: what each holds, in the order in which a sample passes them."""
    if config.parallel.pipeline_layers is None or config.parallel.chunks == 1:
        return None  # equally many, or all in one
    chunks = [["decoder"] * layers for layers in config.parallel.pipeline_layers]
    return [["embedding", *chunks[0]], *chunks[1:-1], [*chunks[-1], "loss"]]


def build_model(config: RunConfig, platform: Platform) -> list[GPT]:
    """Build this rank's model chunks on its device, after the process groups are up.

    Args:
        config: The run configuration.
        platform: What the run computes on.

    Returns:
        A Megatron-Core `GPTModel` for each chunk: `parallel.virtual_pipeline` of them. Their parameters have the
        dtype of `train.precision`.
    """
    backends = choose_backends(on_cuda=platform.name == "cuda", **config.backend_arguments())
    for setting in backends.own_kernels:
        require_kernels(platform.device, setting)
    mcore = transformer_config(
        config,
        transformer_engine=backends.layers.name == "transformer_engine",
        fused_weight_gradient=backends.weight_gradient.name == "davinci",
    )
    if config.parallel.overlap_tensor:
        start_tensor_overlap(config)
    count = config.parallel.virtual_pipeline
    chunks = []
    for number in range(count):
        stage = number if count > 1 else None
        chunk = GPT(
            mcore,
            block_spec(mcore, backends, config.model, chunk=stage),
            vocab_size=config.model.vocab_size,
            max_sequence_length=config.model.max_sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage() and number == 0,
            post_process=parallel_state.is_pipeline_last_stage() and number == count - 1,
            position_embedding_type="rope",
            rotary_base=config.model.rope_base,
            share_embeddings_and_output_weights=config.model.tie_embeddings,
            vp_stage=stage,
            z_loss=config.train.z_loss,
            rope_scaling=config.model.rope_scaling,
            vocab_padding=config.model.vocab_padding,
            own_loss=backends.loss.name == "davinci",
            loss_chunk=config.backends.loss_chunk_tokens,
            own_rope=backends.rope.name == "davinci",
        )
        mark_experts(chunk)
        initialize(chunk, config.run.seed, config.model.init_std)
        chunks.append(chunk.to(platform.device))
    if backends.low_precision.name in ("native", "emulate"):
        chunks[0].low_precision = LowPrecision(
            chunks,
            config,
            native=backends.low_precision.name == "native",
            fused_swiglu=backends.swiglu.name == "davinci",
        )
    return chunks
