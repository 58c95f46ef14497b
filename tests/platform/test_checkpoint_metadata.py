"""A `.metadata` that is none is refused for what it is, at once and in little memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_davinci.platform.checkpoint_metadata import read_metadata
from megatron_davinci.platform.safe_pickle import NotPlain

METADATA = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n"
STORED = b"ctorch.distributed.checkpoint.filesystem\n_StorageInfo\n)\x81"
NO_TENSORS = b")\x81}(X\x13\x00\x00\x00state_dict_metadata}X\x0c\x00\x00\x00storage_data"


@pytest.mark.parametrize(
    "content,said",
    [
        (METADATA + b".", "a type, where"),
        (METADATA + b")\x81.", "a Metadata, where"),
        (METADATA + NO_TENSORS + b"]ub.", "a Metadata, where"),
        (
            METADATA + NO_TENSORS + b"}K\x01" + STORED + b"}X\x0d\x00\x00\x00relative_pathK\x05sbsub.",
            "does not say",
        ),
        (METADATA + NO_TENSORS + b"}K\x01" + STORED + b"sub.", "does not say"),
        # A text of 2^40 letters, of tuples of twice the same.
        (b"\x80\x02cpathlib\nPosixPath\nX\x01\x00\x00\x00a" + b"2\x86" * 40 + b"\x85R.", "anything but text"),
    ],
)
def test_what_is_no_metadata_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(content)
    with pytest.raises(NotPlain, match=said):
        read_metadata(path)
