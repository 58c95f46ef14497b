"""In what the models of two checkpoints, or of a checkpoint and a run, differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What is not in the weights, or only says how they began.
_IGNORED = {"preset", "init_std", "dropout", "family"}
# A switch that is younger than a checkpoint was off.
_OFF: dict[str, Any] = {
    "qk_norm": False,
    "qk_norm_scope": "head",
    "norm_placement": "pre",
    "rope_scaling": None,
    "vocab_padding": 0,
}


def differences(saved: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Sizes and switches in which a checkpoint's model is another one.

    Args:
        saved: The `model` section in the checkpoint's manifest.
        model: The other model's, resolved.

    Returns:
        By key of `model`, what the checkpoint says and what the other does.
    """
    known = {**_OFF, **saved}
    return {
        key: (known.get(key), value)
        for key, value in {**_OFF, **model}.items()
        if key not in _IGNORED and known.get(key) != value
    }
