"""Products of the layers' matrices in 8 bits or fewer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from megatron_davinci.config.section import LocalPath, Section
from megatron_davinci.config.units import Tokens

if TYPE_CHECKING:
    from megatron_davinci.config.run import RunConfig

RECIPES = ("delayed", "current", "block", "mxfp8", "nvfp4", "bits")
NATIVE = ("delayed", "current", "block")
"""Recipes by which torch multiplies itself: FP8 with a scale a tensor, and on Hopper with scales of blocks of 128."""

_OF_TENSORS = ("delayed", "current")

_WITH_A_RECIPE = (
    "backend",
    "keep_first_layers",
    "keep_last_layers",
    "keep_codes",
    "tail_tokens",
    "watch_every_steps",
    "band",
)

_BLOCKS = {"block": 128, "mxfp8": 32, "nvfp4": 16}


class NVFP4Config(Section):
    """Three of the four parts of NVIDIA's recipe (arXiv 2509.25149); the fourth is the layers that are kept."""

    hadamard: bool = Field(
        default=True, description="Transform what weight gradients are made of, 16 tokens at a time"
    )
    tiles: bool = Field(default=True, description="Scale weights by 16 × 16, else by 1 × 16")
    stochastic_rounding: bool = Field(default=True, description="Of gradients, else to the nearest")


class BitsConfig(Section):
    """Recipe `bits`: all that is multiplied in one format (arXiv 2405.18710)."""

    format: str = Field(default="E8M3", description="ExMy: x bits of exponent, y of mantissa")
    rounding: Literal["truncate", "nearest"] = Field(
        default="truncate", description="truncate: leave low bits out, as the paper does"
    )
    scaling: Literal["none", "tensor"] = Field(
        default="none",
        description="tensor: bring each tensor's largest number to the format's largest, 2^32 at most",
    )

    @field_validator("format", mode="after")
    @classmethod
    def _is_one(cls, value: str) -> str:
        found = re.fullmatch(r"E([2-8])M(\d{1,2})", value)
        if found is None or not 1 <= int(found[2]) <= 23:
            raise ValueError(f"{value} is no format: E2 to E8 and M1 to M23, as E8M3 or E4M3")
        return value


class BandConfig(Section):
    """Another run's losses, step by step, which this one's are not to leave."""

    reference: LocalPath = Field(
        description="Run directory of the same steps in `precision`, without a recipe"
    )
    width: float = Field(
        default=0.01, gt=0, lt=1, description="Part of the reference's loss that this one may be above it"
    )
    steps: int = Field(default=100, gt=0, description="Steps over which differences are averaged")


class LowPrecisionConfig(Section):
    """Products of the layers' matrices. All else, and the optimizer, stays as `precision` says."""

    recipe: Literal["none", "delayed", "current", "block", "mxfp8", "nvfp4", "bits"] = Field(
        default="none",
        description="FP8 with a scale a tensor, from earlier steps (`delayed`) or its own (`current`); `block`, with "
        "scales of blocks of 128; `mxfp8`; `nvfp4`; or `bits`, any format",
    )
    backend: Literal["auto", "transformer_engine", "native", "emulate"] = Field(
        default="auto",
        description="native: torch's own FP8 products; emulate: the recipe's rounding and then fp32 products, "
        "anywhere; auto: on GPUs Transformer Engine's, else native where torch has them, on CPUs emulate",
    )
    keep_first_layers: int = Field(
        default=0, ge=0, description="So many first layers multiply as `precision` says"
    )
    keep_last_layers: int = Field(
        default=0, ge=0, description="So many last layers multiply as `precision` says"
    )
    tail_tokens: Tokens | None = Field(
        default=None,
        gt=0,
        description="For the last so many tokens of the run products are as `precision` says",
    )
    tail: Literal["forward", "all"] = Field(
        default="all", description="Which products: those of the forward pass, or gradients' too"
    )
    amax_history: int = Field(
        default=1024, gt=0, description="`delayed`: scales are of the largest numbers of so many steps"
    )
    activations: Literal["as_computed", "fp8"] = Field(
        default="as_computed",
        description="fp8, with `delayed` or `current` by native or emulate: inputs of linear layers are kept as "
        "they were multiplied, those of norms and SwiGLU in E4M3 with a scale for 16 (COAT, arXiv 2410.19313)",
    )
    keep_codes: bool = Field(
        default=False,
        description="native: quantise inputs both ways in the forward pass, and weights once a step, and keep the "
        "transposed codes for gradients: faster, for a byte a number that a linear layer was given and two a weight",
    )
    nvfp4: NVFP4Config = NVFP4Config()
    bits: BitsConfig = BitsConfig()
    parameters: bool = Field(
        default=False,
        description="Transformer Engine: keep the layers' matrices in FP8 beside their fp32 main weights, and gather "
        "them as that",
    )
    watch_every_steps: int | None = Field(
        default=100,
        gt=0,
        description="native and emulate: record largest numbers, scales and what rounding lost, a layer; null: never",
    )

    band: BandConfig | None = Field(
        default=None,
        description="Warn when the loss leaves the band of a reference run; null: do not compare",
    )

    @property
    def block(self) -> int:
        """What our own products need dimensions to be a multiple of."""
        return _BLOCKS.get(self.recipe, 1)

    @property
    def megatron_recipe(self) -> str | None:
        """Megatron-Core's name of an FP8 recipe of Transformer Engine; None for another or none."""
        names = {"delayed": "delayed", "current": "tensorwise", "block": "blockwise", "mxfp8": "mxfp8"}
        return names.get(self.recipe)

    @property
    def description(self) -> dict[str, object]:
        """What decides the numbers; a checkpoint goes on with the same."""
        said: dict[str, object] = {"recipe": self.recipe}
        if self.recipe == "none":
            return said
        said |= {"keep_first_layers": self.keep_first_layers, "keep_last_layers": self.keep_last_layers}
        if self.recipe == "delayed":
            said["amax_history"] = self.amax_history
        if self.recipe == "nvfp4":
            said |= self.nvfp4.model_dump()
        if self.recipe == "bits":
            said |= self.bits.model_dump()
        if self.activations != "as_computed":
            said["activations"] = self.activations
        return said

    def _says(self, name: str) -> bool:
        """Whether a key is not as it is without being written."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    @model_validator(mode="after")
    def _only_what_acts(self) -> LowPrecisionConfig:
        if self.parameters and self.recipe in ("none", "nvfp4", "bits"):
            raise ValueError(
                f"parameters: true keeps FP8 matrices; it needs a recipe of FP8, and found recipe: {self.recipe}"
            )
        for name, recipe in (("amax_history", "delayed"), ("nvfp4", "nvfp4"), ("bits", "bits")):
            if self._says(name) and self.recipe != recipe:
                raise ValueError(f"{name} acts with recipe: {recipe}; found recipe: {self.recipe}")
        for name in _WITH_A_RECIPE:
            if self._says(name) and self.recipe == "none":
                raise ValueError(f"{name} acts with a recipe; found recipe: none")
        if self._says("watch_every_steps") and self.backend == "transformer_engine":
            raise ValueError(
                "watch_every_steps is of backend: native and emulate; found backend: transformer_engine"
            )
        if self.keep_codes and self.recipe not in NATIVE:
            raise ValueError(
                f"keep_codes is of backend: native, which multiplies by recipe: {', '.join(NATIVE)}; found recipe: "
                f"{self.recipe}"
            )
        if self.activations == "fp8" and self.recipe not in _OF_TENSORS:
            raise ValueError(
                f"activations: fp8 keeps what recipe: {' or '.join(_OF_TENSORS)} multiplies; found recipe: "
                f"{self.recipe}"
            )
        if self.keep_codes and self.activations == "fp8":
            raise ValueError(
                "keep_codes keeps transposed codes, and activations: fp8 those as they are: take one"
            )
        if self.tail == "forward" and self.tail_tokens is None:
            raise ValueError("tail says which products change for tail_tokens; there are none")
        return self


def low_precision_problems(config: RunConfig) -> list[str]:
    """What products of few bits rest on."""
    low, problems = config.train.low_precision, []
    if low.recipe == "none":
        return []
    if low.keep_first_layers + low.keep_last_layers >= config.model.num_layers:
        problems.append(
            f"train.low_precision keeps {low.keep_first_layers} first and {low.keep_last_layers} last layers as they "
            f"are, and model.num_layers is {config.model.num_layers}: none is left"
        )
    whole = sum(stage.tokens for stage in config.curriculum)
    if low.tail_tokens is not None and low.tail_tokens >= whole and low.tail == "all":
        problems.append(
            f"train.low_precision.tail_tokens ({low.tail_tokens:,}) is all of the curriculum's {whole:,} tokens: "
            f"nothing would be multiplied by recipe: {low.recipe}"
        )
    own = low.backend in ("native", "emulate") or low.recipe == "bits"
    problems += _own_problems(config) if own else _engine_problems(config)
    problems += size_problems(config, own=own)
    return problems


def _own_problems(config: RunConfig) -> list[str]:
    low, problems = config.train.low_precision, []
    asked = f"backend: {low.backend}" if low.backend in ("native", "emulate") else f"recipe: {low.recipe}"
    if low.backend == "transformer_engine":
        problems.append(
            f"train.low_precision.backend: transformer_engine has no recipe: {low.recipe}: take backend: emulate"
        )
    if low.backend == "native" and low.recipe not in NATIVE:
        problems.append(
            "train.low_precision.backend: native multiplies by recipe: delayed, current and block; found "
            f"{low.recipe}: take backend: emulate, anywhere, or transformer_engine"
            + (" on Blackwell" if low.recipe in ("mxfp8", "nvfp4") else "")
        )
    if config.backends.layers == "transformer_engine":
        problems.append(
            f"train.low_precision.{asked} is in our own layers; found backends.layers: transformer_engine"
        )
    if low.keep_codes and low.backend == "emulate":
        problems.append("train.low_precision.keep_codes is of backend: native; found backend: emulate")
    if low.parameters:
        problems.append(
            f"train.low_precision.parameters is Transformer Engine's; found backend: {low.backend}"
        )
    return problems + place_problems(config, f"train.low_precision.{asked}")


def place_problems(config: RunConfig, said: str) -> list[str]:
    """Where our own products are not, whatever their sizes; a line each.

    Args:
        config: The run configuration.
        said: What of it they are in words.
    """
    problems = []
    if config.model.experts is not None:
        others = "" if config.train.low_precision.recipe == "bits" else ": take backend: transformer_engine"
        problems.append(f"{said} is not in experts{others}")
    if config.train.cuda_graphs:
        problems.append(f"train.cuda_graphs cannot capture {said}, which changes from step to step")
    return problems


def _engine_problems(config: RunConfig) -> list[str]:
    """Of Transformer Engine's products, which `auto` may come to."""
    low, parallel, problems = config.train.low_precision, config.parallel, []
    asked = low.backend == "transformer_engine"
    if asked and config.train.precision == "fp32":
        problems.append(
            "train.low_precision.backend: transformer_engine is beside bf16; found train.precision: fp32"
        )
    if asked and config.backends.layers == "local":
        problems.append(
            "train.low_precision.backend: transformer_engine acts in its layers; found backends.layers: local"
        )
    if low.recipe == "delayed" and "layernorm" in config.train.recompute.modules:
        problems.append(
            "train.recompute.modules names layernorm, which Megatron-Core cannot recompute under "
            "train.low_precision.recipe: delayed: take another recipe, or backend: emulate or native"
        )
    if low.recipe == "delayed" and asked and (low.keep_first_layers or low.keep_last_layers):
        problems.append(
            "train.low_precision keeps layers, which Megatron-Core does not under recipe: delayed: take current"
        )
    if low.recipe == "mxfp8" and low.parameters and parallel.overlap_parameter_gather:
        problems.append(
            "train.low_precision.parameters under mxfp8 shares the gradients' buffer; not with "
            "overlap_parameter_gather"
        )
    if low.parameters and not parallel.distributed_optimizer:
        problems.append("train.low_precision.parameters needs parallel.distributed_optimizer: true")
    if asked and low.keep_codes:
        problems.append(
            "train.low_precision.keep_codes is of backend: native; found backend: transformer_engine"
        )
    if asked and low.recipe == "nvfp4" and low.nvfp4 != NVFP4Config():
        problems.append("train.low_precision.nvfp4 is of our own products: take backend: emulate")
    return problems


def size_problems(config: RunConfig, *, own: bool) -> list[str]:
    """Dimensions that blocks do not divide; a line each.

    Args:
        config: The run configuration.
        own: Whether our own products are meant, and not Transformer Engine's.
    """
    low, model, parallel = config.train.low_precision, config.model, config.parallel
    block = low.block if own else 32 if low.recipe == "mxfp8" else 16
    if low.backend == "native" and low.recipe in _OF_TENSORS:
        block = 16  # bytes that torch's FP8 kernels read at a time
    heads = (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
    # We gather a sequence before it is quantised, Transformer Engine quantises its parts.
    shared = parallel.tensor if parallel.sequence and not own else 1
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size / parallel.tensor": model.ffn_hidden_size // parallel.tensor,
        "channels of queries, keys and values / parallel.tensor": heads // parallel.tensor,
        "channels of attention / parallel.tensor": model.num_attention_heads
        * model.kv_channels
        // parallel.tensor,
        "tokens of a micro-batch on a rank": config.data.sequence_length
        * config.train.micro_batch_size
        // (parallel.context * shared),
    }
    return [
        f"{name} ({size}) is not a multiple of {block}, which train.low_precision.recipe: {low.recipe} multiplies at "
        "a time"
        for name, size in sizes.items()
        if size % block
    ]
