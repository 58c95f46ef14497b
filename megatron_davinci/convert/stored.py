"""Reading single tensors out of a Megatron-Core `torch_dist` checkpoint, in one process, from any layout."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_davinci.errors import CheckpointError


class StoredTensors:
    """The weights of a checkpoint by their stored keys; each is read when it is asked for.

    Args:
        state: The folder that Megatron-Core wrote.

    Raises:
        CheckpointError: It cannot be read.
    """

    def __init__(self, state: Path) -> None:
        self._state = state
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                entries: Mapping[str, Any] = dist_checkpointing.load_tensors_metadata(str(state))
        except Exception as error:  # whatever reading a damaged file raises
            raise CheckpointError("The checkpoint cannot be read.", where=state, found=error) from error
        self._entries = {key: entry for key, entry in entries.items() if not key.startswith("optimizer.")}

    def keys(self) -> set[str]:
        """Stored keys of the weights."""
        return set(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape of a weight; weights of layers have the layers as their first axis."""
        return tuple(self._entries[key].global_shape)

    def read(self, key: str) -> Tensor:
        """Read a whole weight onto the CPU."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            loaded = dist_checkpointing.load(
                {key: replace(self._entries[key])}, str(self._state), validate_access_integrity=False
            )
        return loaded[key]
