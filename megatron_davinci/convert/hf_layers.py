"""transformers' own layers, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_davinci.errors import ConfigError, EnvironmentProblem


class HFLayers:
    """One layer of a Hugging Face model in fp32 on the CPU, into which the weights of any layer are put.

    The layer, the norm and the rotary embedding are those that `AutoModelForCausalLM` builds; no weight but a layer's
    is in memory, and no code of the folder is run.

    Args:
        folder: With `config.json`.

    Raises:
        ConfigError: transformers refuses `config.json`.
        EnvironmentProblem: transformers is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError as error:
            raise EnvironmentProblem(
                "A conversion is held against transformers, which is not installed.",
                found=error,
                do="pip install 'megatron-davinci[eval]', or leave the check out with --skip-verify",
            ) from error
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # each class checks its settings in its own way
            raise ConfigError(
                "transformers does not take the model's config.json.",
                where=folder / "config.json",
                found=error,
                expected="settings of the types and sizes that the family's class in transformers wants",
                do="mend config.json; of a model of ours, write it as another --family",
            ) from error
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1]
        # It is causal by itself where no mask is given.
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            decoder = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().model
        self._layer, self._norm = decoder.layers[0], decoder.norm
        self._rotary = type(decoder.rotary_emb)(config=config)
        self._outputs: dict[str, Tensor] = {}
        for name, module in self._layer.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_hook(self._noting(name))

    @torch.no_grad()
    def layer(
        self, number: int, weights: Mapping[str, Tensor], hidden: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute a layer.

        Args:
            number: The layer's.
            weights: All of its weights by name, fp32.
            hidden: [batch, sequence, hidden] fp32.

        Returns:
            What comes out, and what the module of each weight gave, [batch, sequence, channels], by weight's name.
        """
        prefix = f"model.layers.{number}."
        own = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
        self._layer.load_state_dict(own, strict=True, assign=True)
        positions = torch.arange(hidden.shape[1])[None]
        out = self._layer(
            hidden,
            attention_mask=None,
            position_ids=positions,
            position_embeddings=self._rotary(hidden, positions),
        )
        outputs = {prefix + name: self._outputs[name.rpartition(".")[0]] for name in own}
        self._outputs = {}
        return out[0] if isinstance(out, tuple) else out, outputs

    @torch.no_grad()
    def norm(self, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """The norm behind the last layer, of [batch, sequence, hidden]."""
        (weight,) = weights.values()
        self._norm.load_state_dict({"weight": weight}, strict=True, assign=True)
        normal: Tensor = self._norm(hidden)
        return normal

    def _noting(self, name: str) -> Any:
        def note(module: Any, given: Any, out: Tensor) -> None:
            self._outputs[name] = out.detach().flatten(2)

        return note
