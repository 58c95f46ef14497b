"""Megatron-LM's flags for memory, overlap and exactness in our words."""

from __future__ import annotations

from typing import Any

from megatron_davinci.convert.megatron_ledger import Ledger

_MODULES = ("core_attn", "layernorm", "mlp", "moe")
_RECIPES = {"delayed": "delayed", "tensorwise": "current", "blockwise": "block", "mxfp8": "mxfp8"}
_SAME = "none: results are the same"


def recompute(ledger: Ledger) -> dict[str, Any]:
    """`train.recompute`; empty where nothing is recomputed."""
    found = _recompute(ledger)
    ledger.ignore("--recompute-modules", "it acts with --recompute-granularity selective")
    for name in ("--recompute-method", "--recompute-num-layers"):
        ledger.ignore(name, "it acts with --recompute-granularity full")
    return found


def _recompute(ledger: Ledger) -> dict[str, Any]:
    granularity = ledger.text("--recompute-granularity")
    if granularity is None and ledger.has("--recompute-activations"):
        granularity = "selective"
    if granularity not in ("selective", "full"):
        if granularity is not None:
            ledger.problem("--recompute-granularity", expected="selective or full")
        return {}
    for name in ("--recompute-granularity", "--recompute-activations"):
        ledger.carry(name, "train.recompute.granularity")
    if granularity == "selective":
        given = ledger.given.get("--recompute-modules")
        asked = list(dict.fromkeys(given.values)) if given is not None else ["core_attn"]
        modules = [name for name in asked if name in _MODULES]
        ledger.carry("--recompute-modules", "train.recompute.modules")
        if len(modules) < len(asked):
            rest = ", ".join(name for name in asked if name not in _MODULES)
            ledger.lost_note("--recompute-modules", f"{rest} cannot be recomputed alone", _SAME)
        return {"granularity": "selective", "modules": modules} if modules else {}
    found: dict[str, Any] = {"granularity": "full"}
    method = ledger.text("--recompute-method")
    if method not in ("uniform", "block"):
        ledger.problem("--recompute-method", expected="uniform or block, with --recompute-granularity full")
        return {}
    found["method"] = method
    found["layers"] = ledger.integer("--recompute-num-layers", 1, least=1)
    ledger.carry("--recompute-method", "train.recompute.method")
    ledger.carry("--recompute-num-layers", "train.recompute.layers")
    return found


def train(ledger: Ledger) -> dict[str, Any]:
    """Keys of `train`."""
    found: dict[str, Any] = {}
    if again := recompute(ledger):
        found["recompute"] = again
    if ledger.has("--deterministic-mode"):
        found["deterministic"] = True
        ledger.carry("--deterministic-mode", "train.deterministic")
    if ledger.has("--fp8-format"):
        recipe = ledger.text("--fp8-recipe", "delayed") or ""
        if recipe in _RECIPES:
            found["fp8"] = {
                "recipe": _RECIPES[recipe],
                "parameters": ledger.has("--fp8-param-gather") and ledger.has("--use-distributed-optimizer"),
            }
            ledger.carry("--fp8-recipe", "train.fp8.recipe")
            hybrid = recipe in ("delayed", "tensorwise")
            if ledger.text("--fp8-format") != ("hybrid" if hybrid else "e4m3"):
                ledger.lost_note(
                    "--fp8-format", "the recipe decides the formats", "compare docs/concepts/levers.md"
                )
            ledger.carry("--fp8-format", "train.fp8.recipe, which decides it")
            ledger.carry("--fp8-param-gather", "train.fp8.parameters")
        ledger.lose("--fp8-recipe", "there is no such recipe", "set train.fp8.recipe")
        ledger.lose("--fp8-format", "there is no such recipe", "set train.fp8.recipe")
    for name in ("--fp8-recipe", "--fp8-param-gather"):
        ledger.ignore(name, "it acts with --fp8-format")
    return found


def parallel(ledger: Ledger, found: dict[str, Any]) -> dict[str, Any]:
    """Keys of `parallel`, beside those that were found before."""
    more: dict[str, Any] = {}
    if found["distributed_optimizer"] and found["overlap_gradient_reduce"]:
        if ledger.has("--overlap-param-gather"):
            more["overlap_parameter_gather"] = True
        ledger.carry("--overlap-param-gather", "parallel.overlap_parameter_gather")
    ledger.lose(
        "--overlap-param-gather",
        "it needs --overlap-grad-reduce and --use-distributed-optimizer",
        _SAME,
    )
    if found.get("sequence"):
        if ledger.has("--tp-comm-overlap"):
            more["overlap_tensor"] = True
        ledger.carry("--tp-comm-overlap", "parallel.overlap_tensor")
    ledger.lose("--tp-comm-overlap", "it needs --sequence-parallel", _SAME)
    instances = ledger.integer("--num-distributed-optimizer-instances", 1, least=1)
    if instances and instances > 1 and found["distributed_optimizer"]:
        more["optimizer_instances"] = instances
        ledger.carry("--num-distributed-optimizer-instances", "parallel.optimizer_instances")
    ledger.ignore("--num-distributed-optimizer-instances", "there is one instance")
    return more


def optimizer(ledger: Ledger) -> dict[str, Any]:
    """Keys of `optimizer`."""
    found: dict[str, Any] = {}
    fraction = ledger.number("--optimizer-offload-fraction", 1.0)
    if ledger.has("--optimizer-cpu-offload"):
        if (
            fraction is not None
            and 0 < fraction <= 1
            and ledger.has("--bf16")
            and ledger.has("--use-distributed-optimizer")
        ):
            found["cpu_offload"] = fraction
            ledger.carry("--optimizer-cpu-offload", "optimizer.cpu_offload")
            ledger.carry("--optimizer-offload-fraction", "optimizer.cpu_offload")
        why = "it needs --bf16, --use-distributed-optimizer and a fraction from 0 to 1"
        ledger.lose("--optimizer-cpu-offload", why, _SAME)
        ledger.lose("--optimizer-offload-fraction", why, _SAME)
    ledger.ignore("--optimizer-offload-fraction", "nothing is offloaded without --optimizer-cpu-offload")
    return found
