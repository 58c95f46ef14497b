"""The families that there are, and which one a model is of."""

from __future__ import annotations

from typing import Any

from megatron_davinci.convert.family import Family
from megatron_davinci.convert.llama import LLAMA
from megatron_davinci.convert.mistral import MISTRAL
from megatron_davinci.convert.olmo2 import OLMO2
from megatron_davinci.convert.qwen2 import QWEN2
from megatron_davinci.convert.qwen3 import QWEN3
from megatron_davinci.errors import ConfigError

FAMILIES = {family.name: family for family in (QWEN2, LLAMA, QWEN3, MISTRAL, OLMO2)}


def family_of(model: dict[str, Any]) -> Family:
    """The family that a model is exported as, from the `model` section of its configuration."""
    if model.get("family"):
        return FAMILIES[model["family"]]
    if model.get("norm_placement") == "post" or model.get("qk_norm_scope") == "all_heads":
        return OLMO2
    if model.get("qk_norm"):
        return QWEN3
    return QWEN2 if model["qkv_bias"] else LLAMA


def family_named(name: str, where: object) -> Family:
    """A family by its name.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in FAMILIES:
        raise ConfigError(
            "There is no such family.", where=where, found=name, expected=", ".join(FAMILIES), do="choose one"
        )
    return FAMILIES[name]


def family_of_config(config: dict[str, Any], where: object) -> Family:
    """The family of a `config.json`.

    Args:
        config: The parsed file.
        where: Its name, for messages.

    Raises:
        ConfigError: It is none of those that are supported, has code of its own, or is quantised.
    """
    found = []
    if "auto_map" in config:
        found.append("auto_map: the folder brings its own code, which is never run here")
    if config.get("quantization_config"):
        method = config["quantization_config"]
        named = method.get("quant_method", "?") if isinstance(method, dict) else method
        found.append(f"quantization_config: {named}")
    family = FAMILIES.get(str(config.get("model_type")))
    architectures = config.get("architectures") or []
    if family is None:
        found.insert(0, f"model_type: {config.get('model_type')!r}, architectures: {architectures}")
    elif architectures and family.architecture not in architectures:
        found.append(f"architectures: {architectures}, not {family.architecture}")
    if found or family is None:
        raise ConfigError(
            "A model of this kind cannot be imported.",
            where=where,
            found="\n".join(found),
            expected="\n".join(f"{one.name}: {one.architecture}" for one in FAMILIES.values())
            + "\nin fp32, bf16 or fp16, computed by transformers' own class",
            do="save it dequantised, with transformers' own class, or take another model",
        )
    return family
