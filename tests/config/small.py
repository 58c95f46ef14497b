"""The smallest configuration that is whole, as plain settings, for every test that needs one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

_SETTINGS: dict[str, Any] = {
    "run": {"directory": "run"},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "vocab_size": 64,
        "max_sequence_length": 16,
    },
    "parallel": {"device": "cpu"},
    "data": {"sequence_length": 16, "sources": {"web": {"path": "web"}, "code": {"path": "code"}}},
    "curriculum": [
        {
            "name": "one",
            "tokens": 256,
            "mixture": {"web": 0.75, "code": 0.25},
            "global_batch_size": 4,
            "learning_rate": {"peak": 1e-3},
        }
    ],
    "train": {"precision": "fp32"},
    "logging": {"tensorboard": False, "progress": "lines", "every_steps": 1},
}


def settings(**changes: Any) -> dict[str, Any]:
    """A fresh copy; `changes` go below a section (`model={"num_layers": 4}`) or replace a list."""
    whole = copy.deepcopy(_SETTINGS)
    for section, change in changes.items():
        if isinstance(change, dict) and isinstance(whole.get(section), dict):
            whole[section].update(change)
        else:
            whole[section] = change
    return whole


def write(folder: Path, value: Any | None = None) -> Path:
    """`value`, or the settings above, as a YAML file; text is written as it is."""
    path = folder / "config.yaml"
    value = settings() if value is None else value
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value, sort_keys=False))
    return path
