"""RoPE's settings in `config.json`, as transformers 4 and 5 write them, and ours."""

from __future__ import annotations

from typing import Any

_ORIGINAL = "original_max_position_embeddings"
_LLAMA3 = {
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    _ORIGINAL: "original_max_sequence_length",
}


def rope_to_hf(base: float, scaling: dict[str, Any] | None) -> dict[str, Any]:
    """The keys of `config.json`.

    Args:
        base: `model.rope_base`.
        scaling: `model.rope_scaling`.
    """
    parameters: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        parameters = {"rope_type": scaling["kind"], "factor": scaling["factor"]}
        if scaling["kind"] == "llama3":
            parameters |= {theirs: scaling[ours] for theirs, ours in _LLAMA3.items()}
    # transformers 5 reads rope_parameters, earlier releases the other two.
    keys: dict[str, Any] = {"rope_theta": base, "rope_parameters": {**parameters, "rope_theta": base}}
    if scaling is not None:
        keys["rope_scaling"] = parameters
    return keys


def rope_from_hf(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`rope_base` and `rope_scaling` of a `config.json`, and what of it cannot be built here, a line each.

    What holds where a file says several things is what transformers 5 computes with
    (`RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`): all of `rope_scaling`, which is how a context is
    stretched by hand, before all of `rope_parameters`.
    """
    problems: list[str] = []
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    said = config.get(name) or {}
    if not isinstance(said, dict):
        return {}, [f"{name}: {said!r}"]
    if any(isinstance(value, dict) for value in said.values()):
        return {}, [f"{name}: one for each kind of layer ({', '.join(map(str, said))}), not one for all"]
    kind = said.get("rope_type", said.get("type", "default"))
    base = said.get("rope_theta", config.get("rope_theta", 10000.0))
    for where in (said, config):
        if where.get("partial_rotary_factor", 1.0) not in (1, None):
            problems.append(f"partial_rotary_factor: {where['partial_rotary_factor']}, not 1")
    found: dict[str, Any] = {"rope_base": base, "rope_scaling": None}
    if kind in ("linear", "llama3"):
        wanted = {"factor": "factor"} | (_LLAMA3 if kind == "llama3" else {})
        if kind == "llama3" and _ORIGINAL not in config:
            # Where nobody says what the context was before, transformers takes the whole.
            said = {_ORIGINAL: config.get("max_position_embeddings")} | said
        problems += [f"{name}.{key}: is not there" for key in wanted if key not in said]
        scaling = {ours: said.get(theirs) for theirs, ours in wanted.items()}
        found["rope_scaling"] = {"kind": kind, **scaling}
    elif kind != "default":
        problems.append(f"{name}.rope_type: {kind!r}, not 'default', 'linear' or 'llama3'")
    return found, problems
