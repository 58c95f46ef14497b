"""The tiny run at a tenth of its learning rate.

At the whole of it rounding grows to a hundredth of the loss in 50 steps, on a CPU too, and hides what is looked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import tiny_settings


def steady_settings(root: Path, **changes: Any) -> dict[str, Any]:
    """`tiny_settings` with learning rates at which runs that round unlike each other stay together."""
    settings = tiny_settings(root, **changes)
    for stage in settings["curriculum"]:
        shape = stage["learning_rate"]
        shape |= {name: 0.1 * shape[name] for name in ("peak", "end") if name in shape}
    return settings
