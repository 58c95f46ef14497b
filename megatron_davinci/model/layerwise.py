"""Our model one layer at a time, for models that are larger than memory: what a conversion is held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_davinci.config import RunConfig, validate
from megatron_davinci.model.build import transformer_config
from megatron_davinci.model.gpt import GPT
from megatron_davinci.model.spec import block_spec, norm_module
from megatron_davinci.platform import distributed
from megatron_davinci.platform.backends import choose_backends
from megatron_davinci.platform.device import choose


class Layerwise:
    """One layer of the model in fp32 on the CPU, into which the weights of any layer are put.

    Args:
        model: The `model` section of a configuration.
    """

    def __init__(self, model: Mapping[str, Any]) -> None:
        config = _configuration(model)
        mcore = transformer_config(config)
        backends = choose_backends(on_cuda=False, **config.backend_arguments())
        # A stage in the middle of a pipeline: no embedding, no norm behind the last layer, no output matrix.
        self._stage = GPT(
            mcore,
            block_spec(mcore, backends, config.model),
            vocab_size=config.model.vocab_size,
            max_sequence_length=config.model.max_sequence_length,
            pre_process=False,
            post_process=False,
            position_embedding_type="rope",
            rotary_base=config.model.rope_base,
            share_embeddings_and_output_weights=config.model.tie_embeddings,
            rope_scaling=config.model.rope_scaling,
        ).eval()
        self._norm = norm_module(backends)(mcore, config.model.hidden_size, config.model.norm_epsilon)
        self._parameters = dict(_stored(self._stage.sharded_state_dict()))
        self._outputs: dict[str, Tensor] = {}
        owners = {id(p): m for m in self._stage.modules() for p in m.parameters(recurse=False)}
        named = {p.data_ptr(): p for p in self._stage.parameters()}
        for key, data in self._parameters.items():
            parameter = named[data.data_ptr()]
            owner = owners[id(parameter)]
            behind = getattr(owner, "post_layernorm", None)
            if behind is None:
                owner.register_forward_hook(self._noting(key))
            else:  # what it gives goes through a norm of its own
                behind.register_forward_pre_hook(self._noting_given(key))

    @torch.no_grad()
    def layer(self, weights: Mapping[str, Tensor], hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute a layer.

        Args:
            weights: Its weights by stored key, any dtype.
            hidden: [batch, sequence, hidden] fp32.

        Returns:
            What comes out, and what the module of each weight gave, [batch, sequence, channels], by stored key.
        """
        for key, parameter in self._parameters.items():
            parameter.copy_(weights[key])
        self._stage.set_input_tensor(hidden.transpose(0, 1).contiguous())
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
        out = self._stage(ids, None, None).transpose(0, 1)
        outputs, self._outputs = self._outputs, {}
        return out, outputs

    @torch.no_grad()
    def norm(self, weight: Tensor, hidden: Tensor) -> Tensor:
        """The norm behind the last layer, of [batch, sequence, hidden]."""
        self._norm.weight.copy_(weight)
        normal: Tensor = self._norm(hidden)
        return normal

    def _noting_given(self, key: str) -> Any:
        note = self._noting(key)
        return lambda module, given: note(module, given, given[0])

    def _noting(self, key: str) -> Any:
        def note(module: Any, given: Any, out: Any) -> None:
            # [sequence, batch, channels], or [sequence, batch, heads, channels]
            out = out[0] if isinstance(out, tuple) else out
            # A copy: Megatron-Core adds the residual to it in place.
            self._outputs[key] = out.detach().clone().flatten(2).transpose(0, 1)

        return note


@contextmanager
def alone(model: Mapping[str, Any], threads: int | None = None) -> Iterator[Layerwise]:
    """A `Layerwise` in a world of one rank, which ends with the block.

    Args:
        model: The `model` section of a configuration.
        threads: CPU threads; default: one a core.
    """
    platform = choose("cpu", threads)
    begun = not dist.is_initialized()
    if begun:
        # Not by the environment, which may be that of a run.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    distributed.start(platform)
    try:
        yield Layerwise(model)
    finally:
        distributed.stop()


def _stored(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for one in state.values():
        if isinstance(one, ShardedTensor | ShardedTensorFactory):
            yield one.key, one.data


def _configuration(model: Mapping[str, Any]) -> RunConfig:
    """The smallest whole configuration with a layer of this model."""
    length = 1
    return validate(
        {
            "run": {"directory": "."},
            "model": {**model, "num_layers": 1, "dropout": 0.0},
            "parallel": {"device": "cpu"},
            "data": {"sequence_length": length, "sources": {"none": {"path": "none"}}},
            "curriculum": [
                {
                    "name": "none",
                    "tokens": length,
                    "mixture": {"none": 1.0},
                    "global_batch_size": 1,
                    "learning_rate": {"peak": 1.0},
                }
            ],
            "train": {"precision": "fp32"},
        },
        "a conversion",
    )
