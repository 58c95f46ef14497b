"""Writing tensors as Megatron-Core's `torch_dist` files, in one process and one tensor in memory at a time."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import WriteItem

from megatron_davinci.files import disk_errors


class Source(NamedTuple):
    """A tensor that is read when it is written.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
        read: Gives it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def write_state(
    folder: Path, tensors: Mapping[str, Source], opened: Callable[[str, str], IO[bytes]] = open
) -> None:
    """Write a checkpoint's `state` that holds these weights and nothing else.

    Args:
        folder: The folder, which exists and is empty.
        tensors: What to write, by stored key; weights of layers have the layers as their first axis.
        opened: Opens the large files, given name and mode.

    Raises:
        EnvironmentProblem: The disk is full or failing.
    """
    described = {
        key: torch.empty(source.shape, dtype=source.dtype, device="meta") for key, source in tensors.items()
    }
    writer = dcp.FileSystemWriter(str(folder), single_file_per_rank=True, sync_files=False)
    writer.fs = _Files(opened)
    with disk_errors(folder, "writing a checkpoint"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dcp.save(described, storage_writer=writer, planner=_Late(tensors), no_dist=True)
        except dcp.CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
        torch.save({}, folder / "common.pt")
        said: dict[str, Any] = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        said |= {"common_backend": "torch", "common_backend_version": 1}
        (folder / "metadata.json").write_text(json.dumps(said))


class _Late(dcp.DefaultSavePlanner):
    """Reads a tensor when it is its turn to be written."""

    def __init__(self, tensors: Mapping[str, Source]) -> None:
        super().__init__()
        self._tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._tensors[write_item.index.fqn].read().contiguous()


class _Files(FileSystem):
    """The file system, with files that hash what is written to them."""

    def __init__(self, opened: Callable[[str, str], IO[bytes]]) -> None:
        super().__init__()
        self._opened = opened

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        if not str(path).endswith(".distcp"):
            with super().create_stream(path, mode) as file:
                yield file
            return
        with self._opened(str(path), mode) as file:
            yield file
