"""Small Hugging Face models with random weights, of every family, and what our model says with the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rope_theta": 5000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# What is special about each, and what it is called here.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "llama2": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False, "rms_norm_eps": 1e-5}),
    "llama3": ("llama", {"tie_word_embeddings": True, "rope_scaling": LLAMA3}),
    "qwen3": ("qwen3", {"head_dim": 8, "tie_word_embeddings": False}),
    "olmo2": ("olmo2", {"tie_word_embeddings": False, "num_hidden_layers": 2}),
    "mistral": ("mistral", {"sliding_window": None, "num_hidden_layers": 4, "tie_word_embeddings": False}),
}


def build(kind: str, changes: dict[str, Any] | None = None, seed: int = 0) -> Any:
    """A model of transformers, whose norms and biases are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, own = KINDS[kind]
    config = AutoConfig.for_model(family, **{**SIZES, **own, **(changes or {})})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            else:
                # Layers that outweigh the embedding: a model that says more than its last token again.
                parameter.mul_(5 if "embed" in name or "head" in name else 10)
            if name.endswith("o_proj.bias"):
                parameter.zero_()
    return model


def save(folder: Path, kind: str, changes: dict[str, Any] | None = None, seed: int = 0) -> Any:
    model = build(kind, changes, seed)
    model.save_pretrained(folder)
    return model


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the library."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, over the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def logits(checkpoint: Path, model: dict[str, Any], layout: tuple[int, int], tokens: list[list[int]]) -> Any:
    """On a rank: what our model says with a checkpoint: [batch, sequence, vocabulary]; None from other stages."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_davinci.config import validate
    from megatron_davinci.model.build import build_model
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose
    from megatron_davinci.train import checkpoint as checkpoints
    from tests.config import small

    tensor, pipeline = layout
    settings = small.settings(parallel={"tensor": tensor, "pipeline": pipeline}) | {"model": model}
    config = validate(settings, "test")
    platform = choose("cpu", threads=1)
    distributed.start(platform, **config.parallel.groups)
    (chunk,) = build_model(config, platform)
    checkpoints.load_weights(checkpoint, [chunk], config.model.model_dump(mode="json"))
    chunk.eval()
    ids = torch.tensor(tokens)
    with torch.no_grad():
        if pipeline > 1 and not parallel_state.is_pipeline_first_stage():
            received = torch.empty(ids.shape[1], ids.shape[0], config.model.hidden_size)
            torch.distributed.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
            chunk.set_input_tensor(received)
        said = chunk(ids, None, None)
        if pipeline > 1 and not parallel_state.is_pipeline_last_stage():
            torch.distributed.send(said.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            said = None
        else:
            said = gather_from_tensor_model_parallel_region(said).numpy()
    torch.distributed.barrier()
    distributed.stop()
    return said


def resave(source: Path, folder: Path, model: dict[str, Any], layout: tuple[int, int]) -> None:
    """On each rank: load a checkpoint's weights on a layout, and save them from there."""
    from megatron_davinci.config import validate
    from megatron_davinci.model.build import build_model
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose
    from megatron_davinci.train import checkpoint
    from tests.config import small
    from tests.convert.ranks import save_chunks

    tensor, pipeline = layout
    parallel = {"tensor": tensor, "pipeline": pipeline, "sequence": tensor > 1}
    config = validate(small.settings(parallel=parallel) | {"model": model}, "test")
    platform = choose("cpu", threads=1)
    distributed.start(platform, **config.parallel.groups)
    chunks = build_model(config, platform)
    checkpoint.load_weights(source, chunks, config.model.model_dump(mode="json"))
    save_chunks(chunks, config, folder)
