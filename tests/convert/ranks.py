"""What ranks do for the tests of conversion: build a model with nothing left as it began, save it, run it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from megatron_davinci.config import RunConfig, validate
from tests.config import small

SIZES: dict[str, Any] = {"num_layers": 4, "vocab_size": 96, "max_sequence_length": 128}


def configuration(changes: dict[str, Any], tensor: int = 1, pipeline: int = 1, virtual: int = 1) -> RunConfig:
    parallel = {
        "tensor": tensor,
        "pipeline": pipeline,
        "virtual_pipeline": virtual,
        "sequence": tensor > 1,
    }
    return validate(small.settings(model={**SIZES, **changes}, parallel=parallel), "test")


def build(config: RunConfig) -> Any:
    """A model's chunks, whose biases and norms are random too, by the tensor's name: the same on every layout."""
    from megatron.core import parallel_state

    from megatron_davinci.model.build import build_model
    from megatron_davinci.model.initialize import global_name
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose

    platform = choose("cpu", threads=1)
    distributed.start(platform, **config.parallel.groups)
    chunks = build_model(config, platform)
    ranks, rank = config.parallel.tensor, parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for chunk, name, parameter in [(c, *named) for c in chunks for named in c.named_parameters()]:
            if parameter.ndim > 1:
                # Layers that outweigh the embedding: a model that says more than its last token again.
                parameter.mul_(5 if "embedding" in name or "output" in name else 15)
                continue
            seed = int.from_bytes(hashlib.sha256(global_name(name, chunk).encode()).digest()[:4], "little")
            cut = name.endswith("bias") or getattr(parameter, "tensor_model_parallel", False)
            parts = ranks if cut else 1
            whole = torch.randn(len(parameter) * parts, generator=torch.Generator().manual_seed(seed))
            parameter.add_(whole.chunk(parts)[rank if parts > 1 else 0], alpha=0.3)
    return chunks


def save(checkpoints: Path, changes: dict[str, Any], tensor: int, pipeline: int, virtual: int) -> None:
    config = configuration(changes, tensor, pipeline, virtual)
    save_chunks(build(config), config, checkpoints)


def save_chunks(chunks: Any, config: RunConfig, checkpoints: Path) -> None:
    """Save a rank's part of a model as the checkpoint of step 0, and leave the groups."""
    from megatron_davinci.optim.build import build_optimizer, set_hyperparameters
    from megatron_davinci.platform import distributed
    from megatron_davinci.train.saver import Saver
    from megatron_davinci.train.step import wrap_model

    wrapped = wrap_model(chunks, config)
    optimizer = build_optimizer(config, wrapped)
    # An optimizer has a state to save once it has stepped; this step moves nothing.
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    set_hyperparameters(optimizer, learning_rate=0.0, weight_decay=0.0)
    optimizer.step()
    description = {
        "step": 0,
        "consumed_samples": 0,
        "model": config.model.model_dump(mode="json"),
        "precision": config.train.precision,
    }
    saver = Saver(checkpoints, config.checkpoint)
    saver.save(chunks, optimizer, description)
    saver.finish()
    distributed.stop()


def logits_and_greedy(changes: dict[str, Any], tokens: list[list[int]], steps: int) -> tuple[Any, list[int]]:
    """Our model's logits [batch, sequence, vocabulary], and how it goes on greedily after the first row."""
    from megatron_davinci.platform import distributed

    (model,) = build(configuration(changes))
    model.eval()

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, None, None)

    with torch.no_grad():
        logits = forward(torch.tensor(tokens))
        ids = torch.tensor(tokens[:1])
        for _ in range(steps):
            ids = torch.cat([ids, forward(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    distributed.stop()
    return logits.numpy(), ids[0, len(tokens[0]) :].tolist()
