"""Megatron-LM's flags for memory, overlap and exactness in our words."""

from __future__ import annotations

from typing import Any

from megatron_davinci.convert import megatron_muon as muon
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
    if low := _low_precision(ledger):
        found["low_precision"] = low
    return found


def _low_precision(ledger: Ledger) -> dict[str, Any]:
    """`train.low_precision`: Transformer Engine's FP8 or FP4; empty where there is neither."""
    found: dict[str, Any] = {}
    recipe = ledger.text("--fp8-recipe", "delayed") or ""
    if not ledger.has("--bf16"):
        for name in ("--fp8-format", "--fp4-format"):
            ledger.lose(name, "it is beside --bf16 only", "give --bf16, or leave it out")
    elif ledger.has("--fp8-format") and recipe in _RECIPES:
        found = {
            "recipe": _RECIPES[recipe],
            "parameters": ledger.has("--fp8-param-gather") and muon.cut(ledger),
        }
        if muon.asked(ledger):
            ledger.lose("--fp8-param-gather", "weights that Muon moves are kept in bf16", _SAME)
        ledger.carry("--fp8-recipe", "train.low_precision.recipe")
        hybrid = recipe in ("delayed", "tensorwise")
        if ledger.text("--fp8-format") != ("hybrid" if hybrid else "e4m3"):
            ledger.lost_note(
                "--fp8-format", "the recipe decides the formats", "compare docs/concepts/precision.md"
            )
        ledger.carry("--fp8-format", "train.low_precision.recipe, which decides it")
        ledger.carry("--fp8-param-gather", "train.low_precision.parameters")
        if recipe == "delayed":
            found["amax_history"] = _amax_history(ledger)
    elif ledger.has("--fp4-format") and ledger.text("--fp4-recipe", "nvfp4") == "nvfp4":
        found = {"recipe": "nvfp4"}
        ledger.carry("--fp4-format", "train.low_precision.recipe, which decides it")
        ledger.carry("--fp4-recipe", "train.low_precision.recipe")
    if found:
        found["backend"] = "transformer_engine"
    if found and ledger.has("--first-last-layers-bf16") and found["recipe"] != "delayed":
        for name, key in (("start", "keep_first_layers"), ("end", "keep_last_layers")):
            found[key] = ledger.integer(f"--num-layers-at-{name}-in-bf16", 1, least=0)
            ledger.carry(f"--num-layers-at-{name}-in-bf16", f"train.low_precision.{key}")
        ledger.carry("--first-last-layers-bf16", "train.low_precision.keep_first_layers and keep_last_layers")
    for name in ("--fp8-recipe", "--fp8-format", "--fp4-recipe", "--fp4-format"):
        if ledger.has("--fp8-format") or ledger.has("--fp4-format"):
            ledger.lose(name, "there is no such recipe", "set train.low_precision.recipe")
    for name in ("--fp8-recipe", "--fp8-param-gather", "--fp8-amax-history-len", "--fp8-amax-compute-algo"):
        ledger.ignore(name, "it acts with --fp8-format")
    ledger.ignore("--fp4-recipe", "it acts with --fp4-format")
    for name in ("--first-last-layers-bf16", "--num-layers-at-start-in-bf16", "--num-layers-at-end-in-bf16"):
        ledger.ignore(name, "it acts with FP8 or FP4, and not with --fp8-recipe delayed")
    return found


def _amax_history(ledger: Ledger) -> int:
    """`amax_history`. Megatron-LM's most recent number is the largest of a history of one."""
    length = ledger.integer("--fp8-amax-history-len", 1, least=1) or 1
    newest = ledger.text("--fp8-amax-compute-algo", "most_recent") == "most_recent"
    for name in ("--fp8-amax-history-len", "--fp8-amax-compute-algo"):
        ledger.carry(name, "train.low_precision.amax_history")
    return 1 if newest else length


def parallel(ledger: Ledger, found: dict[str, Any]) -> dict[str, Any]:
    """Keys of `parallel`, beside those that were found before."""
    more: dict[str, Any] = {}
    if muon.asked(ledger):
        ledger.lose("--overlap-param-gather", "Muon's weights are sent after each update", _SAME)
    elif muon.cut(ledger) and found["overlap_gradient_reduce"]:
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
    if instances and instances > 1 and muon.cut(ledger):
        more["optimizer_instances"] = instances
        ledger.carry("--num-distributed-optimizer-instances", "parallel.optimizer_instances")
    ledger.ignore("--num-distributed-optimizer-instances", "there is one instance")
    return more


def optimizer(ledger: Ledger) -> dict[str, Any]:
    """Keys of `optimizer`."""
    found: dict[str, Any] = {}
    fraction = ledger.number("--optimizer-offload-fraction", 1.0)
    if ledger.has("--optimizer-cpu-offload"):
        if fraction is not None and 0 < fraction <= 1 and ledger.has("--bf16") and muon.cut(ledger):
            found["cpu_offload"] = fraction
            ledger.carry("--optimizer-cpu-offload", "optimizer.cpu_offload")
            ledger.carry("--optimizer-offload-fraction", "optimizer.cpu_offload")
        why = "it needs AdamW, --bf16, --use-distributed-optimizer and a fraction from 0 to 1"
        ledger.lose("--optimizer-cpu-offload", why, _SAME)
        ledger.lose("--optimizer-offload-fraction", why, _SAME)
    ledger.ignore("--optimizer-offload-fraction", "nothing is offloaded without --optimizer-cpu-offload")
    return found
