"""Which activations are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_davinci.config.section import Section

Module = Literal["core_attn", "layernorm", "mlp", "moe"]


class RecomputeConfig(Section):
    """Less memory for more computing. The numbers of a run do not change."""

    granularity: Literal["none", "selective", "full"] = Field(
        default="none", description="selective: the parts of a layer in `modules`; full: whole layers"
    )
    modules: list[Module] = Field(
        default=[],
        description="With selective: `layernorm` (the norms' outputs), `mlp` (all between its input and output), "
        "`moe` (the same of experts), `core_attn` (attention between queries, keys, values and its output)",
    )
    method: Literal["uniform", "block"] = Field(
        default="uniform",
        description="With full: `uniform` keeps the input of every `layers` layers; `block` recomputes the first "
        "`layers` of each pipeline stage and keeps the rest",
    )
    layers: int = Field(default=1, ge=1, description="With full: see `method`")

    @model_validator(mode="after")
    def _only_what_acts(self) -> RecomputeConfig:
        problems = []
        if self.granularity == "selective" and not self.modules:
            problems.append("granularity: selective needs modules: of layernorm, mlp, moe, core_attn")
        if self.granularity != "selective" and self.modules:
            problems.append(
                f"modules are recomputed with granularity: selective; found granularity: {self.granularity}"
            )
        if len(set(self.modules)) < len(self.modules):
            problems.append(f"modules names one twice: {', '.join(self.modules)}")
        if self.granularity != "full":
            for name in sorted({"method", "layers"} & self.model_fields_set):
                if getattr(self, name) != type(self).model_fields[name].default:
                    problems.append(
                        f"{name} acts with granularity: full; found granularity: {self.granularity}"
                    )
        if problems:
            raise ValueError("; ".join(problems))
        return self
