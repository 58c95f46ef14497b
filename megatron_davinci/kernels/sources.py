"""Where the kernels' sources are, and what they are."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

WHOLE = "kernels.cu"
"""What includes all others: the translation unit of nvcc and of the emulator."""


@lru_cache(maxsize=1)
def folder() -> Path:
    """The folder with the sources: the package's own copy, or in a checkout `csrc/kernels`."""
    here = Path(__file__).resolve().parent
    packaged = here / "csrc"
    return packaged if packaged.is_dir() else here.parents[1] / "csrc" / "kernels"


def files(where: Path | None = None) -> dict[str, str]:
    """The text of each source, by name, in the order of names.

    Args:
        where: Another folder with sources than the package's.
    """
    found = sorted((where or folder()).iterdir())
    return {path.name: path.read_text("utf-8") for path in found if path.suffix in (".cu", ".h")}


def digest(where: Path | None = None) -> str:
    """16 hexadecimal digits that change with any source. A library carries those of the sources it was made from."""
    whole = hashlib.sha256()
    for name, text in files(where).items():
        whole.update(f"{name}\0{text}\0".encode())
    return whole.hexdigest()[:16]
