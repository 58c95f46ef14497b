"""Files are written whole on any file system."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_davinci.files import fsync_folder


def test_a_folder_that_cannot_be_synced_is_no_error():
    folder = Path("/proc")
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        pytest.skip("no /proc")
    try:
        with pytest.raises(OSError) as refused:
            os.fsync(opened)
    finally:
        os.close(opened)
    assert refused.value.errno == errno.EINVAL, "as on file systems that have no sync of folders"
    fsync_folder(folder)
