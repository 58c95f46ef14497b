"""Checkpoints as Megatron-LM saves them (`megatron/training/checkpointing.py`), by Megatron-Core's own writer."""

from __future__ import annotations

import argparse
import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "ffn_hidden_size": 48,
}
VOCABULARY, PADDED, SEQUENCE = 90, 96, 64


def arguments(**changes: Any) -> argparse.Namespace:
    """What a training script of Megatron-LM has parsed, as far as it says what the model is."""
    from megatron.core.transformer.enums import AttnBackend

    whole: dict[str, Any] = {
        **SIZES,
        "group_query_attention": True,
        "seq_length": SEQUENCE,
        "max_position_embeddings": SEQUENCE,
        "position_embedding_type": "rope",
        "rotary_base": 5000,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": False,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "swiglu": True,
        "untie_embeddings_and_output_weights": True,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-5,
        "apply_layernorm_1p": False,
        "qk_layernorm": False,
        "num_experts": None,
        "mtp_num_layers": None,
        "multi_latent_attention": False,
        "window_size": None,
        "init_method_std": 0.01,
        "padded_vocab_size": PADDED,
        "params_dtype": torch.float32,
        "attention_backend": AttnBackend.auto,
        "ckpt_format": "torch_dist",
        "save": Path("/checkpoints"),
    }
    return argparse.Namespace(**whole | changes)


def save(
    folder: Path,
    changes: dict[str, Any],
    tensor: int,
    pipeline: int,
    virtual: int | None,
    tokens: list[list[int]],
) -> Any:
    """Save iteration 70 of a model with random weights; returns its logits where one rank has all of it."""
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose

    distributed.start(
        choose("cpu", threads=1), tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual or 1
    )
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    args = arguments(**changes)
    config = TransformerConfig(
        **SIZES,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=args.add_qkv_bias,
        layernorm_epsilon=args.norm_epsilon,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_dtype=torch.float32,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )
    state: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": 70}
    logits = None
    for number in range(virtual or 1):
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=True) and number == 0
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True) and number == (virtual or 1) - 1
        given = {"vp_stage": number} if virtual else {}
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=PADDED,
            max_sequence_length=SEQUENCE,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=args.rotary_base,
            **given,
        )
        key = f"model{number}" if virtual else "model"
        state[key] = model.sharded_state_dict()
        fill(state[key])
        if tensor * pipeline == 1:
            with torch.no_grad():
                logits = model.eval()(torch.tensor(tokens), torch.arange(len(tokens[0]))[None], None).numpy()
    weight = torch.ones(1000)
    state["optimizer"] = {
        "optimizer": {"param_groups": [{"lr": 1e-3, "step": 70}]},
        "state": dist_checkpointing.ShardedTensor.from_rank_offsets(
            "optimizer.state.exp_avg.decoder", weight, replica_id=torch.distributed.get_rank()
        ),
    }
    state["opt_param_scheduler"] = {"max_lr": 1e-3, "num_steps": 560}
    random_state = [{"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state()}]
    state["rng_state"] = dist_checkpointing.ShardedObject(
        "rng_state", random_state, (1,), (0,), replica_id=torch.distributed.get_rank()
    )
    folder = folder / "iter_0000070"
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
        (folder.parent / "latest_checkpointed_iteration.txt").write_text("70")
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(folder))
    distributed.stop()
    return logits


def fill(state: Any) -> None:
    """Give each weight numbers that depend on its stored key and its place in the whole: the same on every layout."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    for one in list(nested_values(state)):
        for part in nested_values(one.build()) if isinstance(one, ShardedTensorFactory) else [one]:
            if not isinstance(part, ShardedTensor) or not part.data.is_floating_point():
                continue
            seed = int.from_bytes(hashlib.sha256(part.key.encode()).digest()[:4], "little")
            whole = torch.randn(part.global_shape, generator=torch.Generator().manual_seed(seed)) * 0.4
            ahead = part.prepend_axis_num
            whole = whole[tuple(part.global_offset[:ahead])]
            for axis, (first, size) in enumerate(zip(part.global_offset[ahead:], part.local_shape)):
                whole = whole.narrow(axis, first, size)
            with torch.no_grad():
                part.data.copy_(whole + 1 if "norm" in part.key else whole)


def logits_of(checkpoint: Path, model: dict[str, Any], tensor: int, tokens: list[list[int]]) -> Any:
    """What our model says with the weights of a checkpoint: [batch, sequence, vocabulary of this rank]."""
    from megatron_davinci.config import validate
    from megatron_davinci.model.build import build_model
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose
    from megatron_davinci.train import checkpoint as checkpoints
    from tests.config import small

    settings = small.settings(parallel={"tensor": tensor}) | {"model": model}
    config = validate(settings, "test")
    platform = choose("cpu", threads=1)
    distributed.start(platform, **config.parallel.groups)
    chunks = build_model(config, platform)
    checkpoints.load_weights(checkpoint, chunks, config.model.model_dump(mode="json"))
    (one,) = chunks
    with torch.no_grad():
        found = one.eval()(torch.tensor(tokens), None, None).numpy()
    distributed.stop()
    return found
