"""A Megatron-LM checkpoint of a GPT model (`torch_dist`) becomes a checkpoint of ours.

What Megatron-LM saves (`megatron/training/checkpointing.py`, `generate_state_dict`): the weights under
Megatron-Core's names, layers stacked along a first axis; the optimizer's state under `optimizer.`; and in `common.pt`
the run's arguments, its iteration and its schedule. Nothing of it is unpickled: see `platform.safe_pickle`.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from megatron_davinci.convert.families import family_of
from megatron_davinci.convert.megatron_model import model_of
from megatron_davinci.convert.rules import Rule
from megatron_davinci.convert.stored import StoredTensors
from megatron_davinci.convert.write_state import Source, write_state
from megatron_davinci.errors import CheckpointError
from megatron_davinci.platform.safe_pickle import Named, NotPlain, read_plain

_Read = Callable[[int | None], Tensor]  # the whole, or a layer
_TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_(\d{7,})")
# A norm that is a module of its own has other names than one that is fused into the projection that it feeds.
_UNFUSED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class MegatronCheckpoint:
    """A checkpoint of Megatron-LM that can be read.

    Attributes:
        folder: `iter_XXXXXXX`.
        iteration: Its number; None for a `release`.
        arguments: What Megatron-LM was called with, by name: numbers, texts, lists, and a `Named` for anything else.
        stored: Its tensors.
        model: The `model` section of our configuration.
        left: What is in it and is not carried over, a line each.
    """

    folder: Path
    iteration: int | None
    arguments: dict[str, Any]
    stored: StoredTensors
    model: dict[str, Any]
    left: list[str]

    @classmethod
    def of(cls, path: Path) -> MegatronCheckpoint:
        """Read all but the tensors.

        Args:
            path: What Megatron-LM was given as `--save` (its newest checkpoint is meant), or an `iter_XXXXXXX` in it.

        Raises:
            CheckpointError: There is no such checkpoint, it is of another format, damaged, or names what may not be
                in one; or its tensors are not those that its arguments speak of.
            ConfigError: The model is one that cannot be built here; all reasons are listed.
        """
        folder = _find(path)
        _check_format(folder)
        common = _common(folder / "common.pt")
        arguments = common.get("args")
        state = arguments.state if isinstance(arguments, Named) else arguments
        if not isinstance(state, dict):
            raise CheckpointError(
                "The checkpoint does not say what model it is of.",
                where=folder / "common.pt",
                found=f"args: {type(arguments).__name__}",
                expected="the arguments that Megatron-LM was called with",
                do="save it with Megatron-LM's own training script",
            )
        stored = StoredTensors(folder)
        embedding = "embedding.word_embeddings.weight"
        rows = stored.shape(embedding)[0] if embedding in set(stored.keys()) else None
        model = model_of(state, folder / "common.pt", rows)
        found = _ITERATION.fullmatch(folder.name)
        iteration = common.get("iteration", int(found[1]) if found else None)
        made = cls(folder, iteration, state, stored, model, _left(folder, common, stored))
        made._check_tensors()
        return made

    @property
    def rules(self) -> list[Rule]:
        """What the model's tensors are."""
        return family_of(self.model).rules_of(self.model)

    def _check_tensors(self) -> None:
        present = self.stored.keys()
        missing, differing = [], []
        for rule in self.rules:
            way = self._way(rule)
            if way is None:
                missing.append(rule.stored)
                continue
            keys, shape, _ = way
            present -= set(keys)
            if shape != rule.stored_shape(self.model):
                differing.append(
                    f"{rule.stored}: shape {list(shape)}, not {list(rule.stored_shape(self.model))}"
                )
        if missing or differing or present:
            lines = [f"missing: {', '.join(missing)}"] if missing else []
            lines += [f"unexpected: {', '.join(sorted(present))}"] if present else []
            raise CheckpointError(
                "The checkpoint's tensors are not those of the model that its arguments speak of.",
                where=self.folder,
                found="\n".join(lines + differing),
                expected=f"a {family_of(self.model).name} model of {self.model['num_layers']} layers",
                do="look whether the model has parts that its arguments do not name",
            )

    def _way(self, rule: Rule) -> tuple[list[str], tuple[int, ...], _Read] | None:
        """The stored keys of a rule's tensor, its shape, and what reads it or a layer; None if it is not there."""
        keys, layers = self.stored.keys(), self.model["num_layers"]
        fused = rule.mcore.partition("{layer}.")[2]
        names = [rule.mcore]
        if fused in _UNFUSED:
            names.append(rule.mcore.replace(fused, _UNFUSED[fused]))
        for name in names:
            one = name.replace(".{layer}", "")
            if one in keys:
                return [one], self.stored.shape(one), partial(_part, self.stored, one)
            # Gate and up projection by themselves, and layers by themselves where they are not all alike.
            halves = [f"{one}_w", f"{one}_v"]
            if all(half in keys for half in halves):
                return self._joined(halves, 1 if rule.per_layer else 0)
            each = [name.format(layer=layer) for layer in range(layers)]
            if rule.per_layer and all(layer in keys for layer in each):
                shapes = {self.stored.shape(layer) for layer in each}
                if len(shapes) == 1:
                    return each, (layers, *shapes.pop()), partial(_stack, self.stored, each)
        return None

    def _joined(self, keys: list[str], axis: int) -> tuple[list[str], tuple[int, ...], _Read]:
        first, second = (self.stored.shape(key) for key in keys)
        shape = (*first[:axis], first[axis] + second[axis], *first[axis + 1 :])

        def read(layer: int | None) -> Tensor:
            parts = [_part(self.stored, key, layer) for key in keys]
            return torch.cat(parts, dim=axis if layer is None else axis - 1)

        return keys, shape, read

    def write(self, folder: Path, opened: Callable[[str, str], IO[bytes]] = open) -> None:
        """Write the weights as a checkpoint's `state`.

        Args:
            folder: The folder, which exists and is empty.
            opened: Opens the large files, given name and mode.

        Raises:
            EnvironmentProblem: The disk is full or failing.
        """
        tensors = {}
        for rule in self.rules:
            way = self._way(rule)
            assert way is not None  # `of` has looked
            keys, shape, read = way
            layer = read if rule.per_layer else None
            tensors[rule.stored] = Source(self.stored.dtype(keys[0]), shape, partial(read, None), layer)
        write_state(folder, tensors, opened)


def _part(stored: StoredTensors, key: str, layer: int | None) -> Tensor:
    return stored.read(key) if layer is None else stored.layer(key, layer)


def _stack(stored: StoredTensors, keys: list[str], layer: int | None) -> Tensor:
    return torch.stack([stored.read(key) for key in keys]) if layer is None else stored.read(keys[layer])


def _find(path: Path) -> Path:
    tracker = path / _TRACKER
    if not (path / "metadata.json").exists() and tracker.exists():
        said = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if said != "release" and not said.isdigit():
            raise CheckpointError(
                "Megatron-LM's note of its newest checkpoint cannot be read.",
                where=tracker,
                found=said[:60],
                expected="an iteration's number, or release",
                do="name the iter_XXXXXXX folder",
            )
        path = path / (said if said == "release" else f"iter_{int(said):07d}")
    if not path.is_dir():
        raise CheckpointError(
            "There is no checkpoint here.",
            where=path,
            expected="a folder iter_XXXXXXX of Megatron-LM, or the folder that it saves them in",
            do="check the path",
        )
    return path


def _check_format(folder: Path) -> None:
    path = folder / "metadata.json"
    try:
        said = json.loads(path.read_bytes())
        backend = said.get("sharded_backend")
    except FileNotFoundError:
        old = sorted(one.name for one in folder.glob("mp_rank_*"))
        raise CheckpointError(
            "This is no checkpoint of Megatron-LM's distributed format.",
            where=folder,
            found=f"{old[0]}: the older format torch" if old else "no metadata.json",
            expected="--ckpt-format torch_dist",
            do="load it with Megatron-LM and save it with --ckpt-format torch_dist"
            if old
            else "name an iter_XXXXXXX folder, or the folder that it is in",
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            "The checkpoint's metadata.json cannot be read.", where=path, found=error, do="copy it again"
        ) from error
    if backend != "torch_dist":
        raise CheckpointError(
            "The checkpoint is of another format.",
            where=path,
            found=backend,
            expected="torch_dist",
            do="load it with Megatron-LM and save it with --ckpt-format torch_dist",
        )


def _common(path: Path) -> dict[str, Any]:
    """What is in `common.pt` beside tensors. Nothing that it names is imported."""
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            content = read_plain(archive.read(name), inert=lambda name: True)
    except (OSError, ValueError, zipfile.BadZipFile, NotPlain) as error:
        raise CheckpointError(
            "The checkpoint's common.pt cannot be read.", where=path, found=error, do="copy it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            "The checkpoint's common.pt is something else.", where=path, found=type(content).__name__
        )
    return content


def _left(folder: Path, common: dict[str, Any], stored: StoredTensors) -> list[str]:
    left = []
    if stored.has("optimizer.") or stored.has("chained_") or "optimizer" in common:
        left.append("the optimizer's state, and with it weights in fp32 where the model has them in bf16")
    if "iteration" in common:
        left.append(f"the iteration ({common['iteration']}): a run from these weights begins at step 0")
    if "opt_param_scheduler" in common:
        left.append("the learning rate's place in its schedule")
    if stored.has("rng_state") or "rng_state" in common:
        left.append("the states of random generators")
    if "rerun_state_machine" in common or stored.has("rerun_state_machine"):
        left.append("what its checks of repeated steps have noted")
    return left
