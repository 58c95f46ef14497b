"""A Hugging Face folder and a checkpoint are held against each other, a layer of each in memory at a time.

Two things are compared: the tensors, to the bit, by the family's rules; and, since the rules themselves could be
wrong, what is computed with them: on the same tokens, in fp32, by a layer of transformers and by ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_davinci.convert.family import Family
from megatron_davinci.convert.hf_layers import HFLayers
from megatron_davinci.convert.resumable import Progress
from megatron_davinci.convert.rules import Heads, Rule, from_hf
from megatron_davinci.convert.stored import StoredTensors
from megatron_davinci.convert.tensor_files import Tensors
from megatron_davinci.errors import CheckpointError

TOLERANCE = 1e-4
"""Of what a module gives, the largest difference over the largest value. Sums in another order are 1e-6 apart."""

_ROWS = 8192  # of the output matrix at once
_EMBEDDING, _OUTPUT, _NORM = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "decoder.final_layernorm.weight",
)


class OurLayers(Protocol):
    """Our model a layer at a time (`model.layerwise.Layerwise`)."""

    def layer(self, weights: Mapping[str, Tensor], hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What a layer gives, and what the module of each weight gave, by stored key; [batch, sequence, channels]."""
        ...

    def norm(self, weight: Tensor, hidden: Tensor) -> Tensor:
        """The norm behind the last layer."""
        ...


@dataclass(frozen=True)
class Verification:
    """What was compared, and how far apart it was.

    Attributes:
        tensors: That were the same to the bit.
        layers: That were computed on both sides.
        tokens: That they were computed on.
        text: Whether some of them are a text's; the others are random.
        max_layer_difference: Of what any module gave: the largest difference over the largest value.
        max_logit_difference: The largest difference of a logit.
        max_logit: The largest logit, without its sign.
    """

    tensors: int
    layers: int
    tokens: int
    text: bool
    max_layer_difference: float
    max_logit_difference: float
    max_logit: float

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.tensors} tensors equal to the bit; {self.layers} layers computed by transformers and by us on "
            f"{self.tokens} tokens: logits within {self.max_logit_difference:.1e} (largest {self.max_logit:.3g})"
        )


def tokens_for(ids: int, length: int, text: Sequence[int] = (), seed: int = 0) -> Tensor:
    """The batch: a row of random tokens, and one of a text, or of random tokens too where there is none.

    Args:
        ids: Token ids are below it.
        length: Of a row, at most 64.
        text: Ids of a text.
        seed: Of the random ones.
    """
    length = min(length, 64)
    rows = torch.randint(ids, (2, length), generator=torch.Generator().manual_seed(seed))
    written = torch.tensor([one for one in text if one < ids][:length], dtype=torch.int64)
    rows[1, : len(written)] = written
    return rows


def verify(
    folder: Path,
    stored: StoredTensors,
    family: Family,
    model: dict[str, Any],
    ours: OurLayers,
    *,
    text: Sequence[int] = (),
    dtype: torch.dtype | None = None,
    tokens: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Verification:
    """Hold a Hugging Face folder and a checkpoint against each other.

    Args:
        folder: The folder, with `config.json`.
        stored: The checkpoint.
        family: The folder's family.
        model: The `model` section of the checkpoint's configuration.
        ours: Our model a layer at a time.
        text: Ids of a text, for a part of the batch.
        dtype: What was converted to, if not kept: then the tensors are compared in it.
        tokens: How many of the vocabulary both have; default: all.
        progress: Is told layers done, and layers in all.

    Raises:
        CheckpointError: A tensor differs, or what is computed with it; the first is named.
        EnvironmentProblem: transformers is not installed.
    """
    return _Comparison(folder, stored, family, model, ours, dtype).run(text, tokens, progress)


class _Comparison:
    def __init__(
        self,
        folder: Path,
        stored: StoredTensors,
        family: Family,
        model: dict[str, Any],
        ours: OurLayers,
        dtype: torch.dtype | None,
    ) -> None:
        self.folder, self.stored, self.family, self.model = folder, stored, family, model
        self.ours, self.dtype = ours, dtype
        self.theirs = HFLayers(folder)
        self.tensors = Tensors(folder)
        self.heads = Heads.of(model)
        self.rules = {rule.stored: rule for rule in family.rules_of(model)}
        self.compared, self.apart = 0, 0.0

    def run(self, text: Sequence[int], tokens: int | None, progress: Progress) -> Verification:
        layers = self.model["num_layers"]
        ids = tokens or self.model["vocab_size"] - (self.model.get("vocab_padding") or 0)
        batch = tokens_for(ids, self.model["max_sequence_length"], text)
        here, there = self._embedded(batch)
        for layer in range(layers):
            here, there = self._layer(layer, here, there)
            progress(layer + 1, layers)
        weights, parts = self._read(self.rules[_NORM], None)
        here, there = self.ours.norm(weights.float(), here), self.theirs.norm(parts, there)
        self._close(self.rules[_NORM].hf[0], here, there)
        logit, largest = self._logits(here, there, ids)
        self.compared += 1 if self.model["tie_embeddings"] else 2
        return Verification(self.compared, layers, batch.numel(), bool(len(text)), self.apart, logit, largest)

    def _embedded(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        rule = self.rules[_EMBEDDING]
        here = torch.empty(*batch.shape, self.model["hidden_size"])
        there = torch.empty_like(here)
        rows = zip(batch.flatten().tolist(), here.flatten(0, 1), there.flatten(0, 1), strict=True)
        for id_, own, their in rows:
            own.copy_(self._as_written(self.stored.read(rule.stored, id_, id_ + 1)[0]))
            their.copy_(self._as_written(self.tensors.read(rule.hf[0], id_, id_ + 1)[0]))
        self._finite(rule.hf[0], here)
        return here, there

    def _layer(self, layer: int, here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        weights: dict[str, Tensor] = {}
        parts: dict[str, Tensor] = {}
        layered = [rule for rule in self.rules.values() if rule.per_layer]
        for rule in layered:
            weights[rule.stored], own = self._read(rule, layer)
            parts |= own
        for zeros in self.family.zeros_of(self.model):
            name = zeros.hf.format(layer=layer)
            parts[name] = self.tensors.read(name).float()
        here, gave_here = self.ours.layer(weights, here)
        there, gave_there = self.theirs.layer(layer, parts, there)
        for rule in layered:
            # What a matrix gives is cut as its rows are.
            channels = gave_here[rule.stored].flatten(0, 1).T
            for name, part in zip(rule.hf, rule.cut.split(channels, self.heads), strict=True):
                full = name.format(layer=layer)
                self._close(full, part, gave_there[full].flatten(0, 1).T)
        self._close(f"model.layers.{layer}", here, there)
        return here, there

    def _read(self, rule: Rule, layer: int | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Both sides' tensors of a rule, in fp32, which are the same to the bit."""
        whole = self.stored.read(rule.stored) if layer is None else self.stored.layer(rule.stored, layer)
        whole = self._as_written(whole)
        parts = {name: self.tensors.read(name) for name in (name.format(layer=layer) for name in rule.hf)}
        parts = {name: self._as_written(part) for name, part in parts.items()}
        self._finite(rule.hf[0].format(layer=layer), whole)
        if not torch.equal(from_hf(rule, parts, layer, self.heads), whole):
            split = rule.cut.split(whole, self.heads)
            name = next(
                name for name, own in zip(parts, split, strict=True) if not torch.equal(parts[name], own)
            )
            raise self._differs(name, "its values are not the checkpoint's")
        self.compared += len(parts)
        return whole.float(), {name: part.float() for name, part in parts.items()}

    def _as_written(self, tensor: Tensor) -> Tensor:
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def _logits(self, here: Tensor, there: Tensor, ids: int) -> tuple[float, float]:
        rule = self.rules.get(_OUTPUT, self.rules[_EMBEDDING])
        apart = largest = 0.0
        for first in range(0, ids, _ROWS):
            end = min(first + _ROWS, ids)
            own = self._as_written(self.stored.read(rule.stored, first, end))
            their = self._as_written(self.tensors.read(rule.hf[0], first, end))
            self._finite(rule.hf[0], own)
            if not torch.equal(own, their):
                raise self._differs(rule.hf[0], f"rows {first} to {end - 1} are not the checkpoint's")
            said = F.linear(there, their.float())
            apart = max(apart, float((F.linear(here, own.float()) - said).abs().max()))
            largest = max(largest, float(said.abs().max()))
        if not apart <= TOLERANCE * max(1.0, largest):
            raise self._differs(rule.hf[0], f"logits are {apart:.2g} apart, of at most {largest:.3g}")
        return apart, largest

    def _close(self, name: str, here: Tensor, there: Tensor) -> None:
        apart = float((here - there).abs().max() / there.abs().max().clamp_min(1e-30))
        self.apart = max(self.apart, apart)
        if not apart <= TOLERANCE:
            raise self._differs(
                name,
                f"what is computed with it is {apart:.2g} apart, of its largest value: {TOLERANCE} is allowed",
            )

    def _finite(self, name: str, tensor: Tensor) -> None:
        """Nothing can be held against a NaN, which differs from itself; a run that diverged has them."""
        if not tensor.isfinite().all():
            raise CheckpointError(
                "The model has weights that are no numbers, so that nothing can be computed with it.",
                where=self.stored.state,
                found=f"{name}: {int((~tensor.isfinite()).sum()):,} values are NaN or infinite",
                do="take a checkpoint from before they were; --skip-verify converts this one as it is",
            )

    def _differs(self, name: str, how: str) -> CheckpointError:
        return CheckpointError(
            "The conversion is wrong: the two sides are not the same model.",
            where=self.folder,
            found=f"{name}: {how}",
            expected=f"what {self.family.architecture} of transformers and our model have in common",
            do="convert again; if it stays, report it with config.json. --skip-verify leaves this check out",
        )
