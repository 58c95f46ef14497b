"""Reading single tensors out of a Megatron-Core `torch_dist` checkpoint, in one process, from any layout."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_davinci.errors import CheckpointError
from megatron_davinci.platform.checkpoint_metadata import SafeReader

# A model with experts has several optimizers, which Megatron-Core chains.
_OF_AN_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")


class StoredTensors:
    """The weights of a checkpoint by their stored keys; each is read when it is asked for.

    `torch_dist` files are those of `torch.distributed.checkpoint`, which reads them without process groups.

    Args:
        state: The folder that Megatron-Core wrote.

    Raises:
        CheckpointError: It cannot be read.
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        self._reader = SafeReader(str(state))
        try:
            entries = self._reader.read_metadata().state_dict_metadata
        except Exception as error:  # whatever reading a damaged file raises
            raise CheckpointError(
                "The checkpoint's .metadata cannot be read.",
                where=state / ".metadata",
                found=error,
                expected="what torch.distributed.checkpoint writes, and nothing else",
                do="copy the checkpoint again; if it names anything else, do not trust where it is from",
            ) from error
        self._all = set(entries)
        self._entries = {
            key: entry
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not _OF_AN_OPTIMIZER.match(key)
        }

    def keys(self) -> set[str]:
        """Stored keys of the weights."""
        return set(self._entries)

    def has(self, prefix: str) -> bool:
        """Whether anything is stored under a name that begins so, weights or not."""
        return any(key.startswith(prefix) for key in self._all)

    def dtype(self, key: str) -> torch.dtype:
        """Of a weight."""
        return self._entries[key].properties.dtype

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape of a weight; weights of layers have the layers as their first axis."""
        return tuple(self._entries[key].size)

    def read(self, key: str) -> Tensor:
        """Read a whole weight onto the CPU."""
        entry = self._entries[key]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load({key: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor
