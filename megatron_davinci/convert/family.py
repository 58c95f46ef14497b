"""A family of Hugging Face models: its rules for tensors, and its settings under both names, in both directions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from megatron_davinci.convert.rope import rope_from_hf, rope_to_hf
from megatron_davinci.convert.rules import Rule, Zeros
from megatron_davinci.errors import ConfigError

REQUIRED = object()


@dataclass(frozen=True)
class Key:
    """A setting under both names.

    Attributes:
        hf: In `config.json`.
        ours: In the section `model`.
        default: What transformers takes where `config.json` has none; `REQUIRED` where it must be there.
    """

    hf: str
    ours: str
    default: Any = REQUIRED


# What all families have.
KEYS = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "hidden_size"),
    Key("intermediate_size", "ffn_hidden_size"),
    Key("num_hidden_layers", "num_layers"),
    Key("num_attention_heads", "num_attention_heads"),
    Key("num_key_value_heads", "num_query_groups", None),
    Key("head_dim", "head_dim", None),
    Key("max_position_embeddings", "max_sequence_length"),
    Key("rms_norm_eps", "norm_epsilon", 1e-6),
    Key("initializer_range", "init_std", 0.02),
    Key("tie_word_embeddings", "tie_embeddings", False),
)


def defaulting(**defaults: Any) -> tuple[Key, ...]:
    """`KEYS`, where a family's class takes other values than most do for keys that `config.json` has not."""
    return tuple(replace(key, default=defaults.get(key.hf, key.default)) for key in KEYS)


_USUAL = {"norm_placement": "pre", "qk_norm_scope": "head"}
"""What `model` settings are in families that do not say otherwise."""


@dataclass(frozen=True)
class Family:
    """A family.

    Attributes:
        name: Ours, and `model_type` in `config.json`.
        architecture: The class in transformers.
        rules: What its tensors are in Megatron-Core.
        switches: Settings of our `model` section that all its models have set so, besides `_USUAL`.
        keys: Its settings.
        fixed: Keys of `config.json` that must have these values, or be absent.
        written: Keys that exports have besides, where transformers' default would be another.
        zeros: Tensors that ours has not.
        windowed: Whether a `sliding_window` holds without `use_sliding_window`.
        ignored: Endings of tensor names that hold no weights.
    """

    name: str
    architecture: str
    rules: tuple[Rule, ...]
    switches: dict[str, bool | str]
    keys: tuple[Key, ...] = KEYS
    fixed: dict[str, Any] = field(default_factory=dict)
    written: dict[str, Any] = field(default_factory=dict)
    zeros: tuple[Zeros, ...] = ()
    windowed: bool = False
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def rules_of(self, model: dict[str, Any]) -> list[Rule]:
        """The rules that hold for a model, from the `model` section of its configuration."""
        return [rule for rule in self.rules if rule.holds(model)]

    def zeros_of(self, model: dict[str, Any]) -> list[Zeros]:
        """The tensors of zeros that a model has in Hugging Face."""
        return [one for one in self.zeros if one.holds(model)]

    def check(self, model: dict[str, Any]) -> None:
        """Refuse a model that the family cannot hold.

        Raises:
            ConfigError: A switch is set otherwise, or the model has experts; all are listed.
        """
        differing = []
        for name, value in {**_USUAL, **self.switches}.items():
            # A setting that is younger than the checkpoint was as usual.
            found = model.get(name, _USUAL.get(name, False))
            if found != value:
                differing.append(f"model.{name}: {found}, not {value}")
        if model.get("experts") is not None:
            number = model["experts"]["number"]
            differing.append(f"model.experts: {number} in each layer; its layers have one MLP")
        if differing:
            raise ConfigError(
                f"This model cannot be exported as {self.name}.",
                where="model",
                found="\n".join(differing),
                expected=f"what {self.architecture} of transformers computes",
                do="leave model.family out, so that the family follows from the model"
                if model.get("family") and model.get("experts") is None
                else "keep the checkpoint: Megatron-Core's dist_checkpointing reads it, in any layout",
            )

    def hf_config(self, model: dict[str, Any], eod_id: int | None, dtype: str) -> dict[str, Any]:
        """The `config.json` of a model.

        Args:
            model: The `model` section of our configuration.
            eod_id: The end-of-document token, if a tokenizer is known.
            dtype: Name of the weights' dtype, as torch writes it.

        Raises:
            ConfigError: See `check`.
        """
        self.check(model)
        config: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.name}
        config |= {key.hf: model[key.ours] for key in self.keys}
        config["vocab_size"] -= model.get("vocab_padding") or 0
        config["head_dim"] = model["head_dim"] or model["hidden_size"] // model["num_attention_heads"]
        config |= self.fixed | self.written | {"hidden_act": "silu", "attention_dropout": model["dropout"]}
        if any(rule.when == "qkv_bias" for rule in self.rules):
            config["attention_bias"] = bool(model["qkv_bias"])
        config |= rope_to_hf(model["rope_base"], model.get("rope_scaling"))
        return config | {
            "use_cache": True,
            "torch_dtype": dtype,
            "bos_token_id": eod_id,
            "eos_token_id": eod_id,
        }

    def model(self, config: dict[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
        """Our `model` section of a `config.json`.

        Args:
            config: The parsed file.

        Returns:
            The section, what of the file is not carried over, and what cannot be built here; a line each. The
            section is whole only where nothing of the last is there.
        """
        section: dict[str, Any] = {"family": self.name}
        left: list[str] = []
        problems: list[str] = []
        for key in self.keys:
            value = config.get(key.hf, key.default)
            if value is REQUIRED:
                problems.append(f"{key.hf}: is not there")
            elif value is None and key.default is REQUIRED:
                problems.append(f"{key.hf}: null")
            else:
                section[key.ours] = value
        if section.get("num_query_groups", 0) is None:
            section["num_query_groups"] = section.get("num_attention_heads")
        section |= self.switches
        if any(rule.when == "qkv_bias" for rule in self.rules):
            section["qkv_bias"] = bool(config.get("attention_bias", False))
        for name, value in {"hidden_act": "silu", **self.fixed}.items():
            if name in config and config[name] != value:
                problems.append(f"{name}: {config[name]!r}, not {value!r}")
        rope, rope_problems = rope_from_hf(config)
        section |= rope
        problems += rope_problems
        windowed = self.windowed or (config.get("use_sliding_window") and _slides(config))
        # Where the key is absent transformers takes a window of 4096.
        window = config.get("sliding_window", 4096) if windowed else None
        if window:
            length = section.get("max_sequence_length")
            if isinstance(length, int) and isinstance(window, int) and window < length:
                section["max_sequence_length"] = window
                left.append(
                    f"sliding_window ({window}): attention here has no window, so max_sequence_length is "
                    f"{window} and not {length}; up to there both are the same"
                )
        if config.get("attention_dropout"):
            left.append(f"attention_dropout ({config['attention_dropout']}): set model.dropout for it")
        return section, left, problems


def _slides(config: dict[str, Any]) -> bool:
    """Whether any layer of a model that uses a window has one: Qwen's begin behind the first `max_window_layers`."""
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return any(kind != "full_attention" for kind in kinds)
    first, layers = config.get("max_window_layers", 28), config.get("num_hidden_layers")
    return not (isinstance(first, int) and isinstance(layers, int) and first >= layers)
