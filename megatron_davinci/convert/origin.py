"""Which checkpoint an export was made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "training_manifest.json"


def digest_of(checkpoint: Mapping[str, Any]) -> str:
    """SHA-256 over the names and digests of a checkpoint's files.

    Args:
        checkpoint: Its manifest.
    """
    files = checkpoint.get("files") or {}
    text = "".join(f"{name} {entry['sha256']}\n" for name, entry in sorted(files.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def is_of_another(export: Path, checkpoint: Mapping[str, Any]) -> bool:
    """Whether an export says that it was made of another checkpoint than this one. One that says nothing does not.

    Args:
        export: The export's folder.
        checkpoint: The manifest of a checkpoint.
    """
    try:
        said = json.loads((export / MANIFEST).read_bytes())["checkpoint"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(said != digest_of(checkpoint))
