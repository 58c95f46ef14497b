"""Reading single tensors out of a Megatron-Core `torch_dist` checkpoint, in one process, from any layout."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_davinci.errors import CheckpointError


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
        self._reader = dcp.FileSystemReader(str(state))
        try:
            entries = self._reader.read_metadata().state_dict_metadata
        except Exception as error:  # whatever reading a damaged file raises
            raise CheckpointError("The checkpoint cannot be read.", where=state, found=error) from error
        self._entries = {
            key: entry
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer.")
        }

    def keys(self) -> set[str]:
        """Stored keys of the weights."""
        return set(self._entries)

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
