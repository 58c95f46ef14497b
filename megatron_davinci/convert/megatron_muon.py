"""Megatron-LM's flags for Muon in our words."""

from __future__ import annotations

from typing import Any

from megatron_davinci.convert.megatron_ledger import Ledger

_KINDS = ("muon", "dist_muon")
_FLAGS = (
    "--muon-momentum", "--muon-num-ns-steps", "--muon-extra-scale-factor", "--muon-use-nesterov",
    "--muon-scale-mode", "--muon-tp-mode", "--muon-no-split-qkv", "--muon-fp32-matmul-prec",
)  # fmt: skip


def asked(ledger: Ledger) -> bool:
    """Whether the command trains with Muon."""
    return _said(ledger, "--optimizer") in _KINDS


def cut(ledger: Ledger) -> bool:
    """Whether the command's optimizer state is cut into equal runs, which Muon's cannot be."""
    return ledger.has("--use-distributed-optimizer") and not asked(ledger)


def _said(ledger: Ledger, name: str, default: str = "") -> str:
    """A word that the table knows; a flag without one is booked by the table."""
    given = ledger.given.get(name)
    return given.values[0] if given is not None and given.values else default


def shards(ledger: Ledger) -> bool:
    """Whether it is the Muon whose state Megatron-LM divides over data-parallel ranks, by layers."""
    layers = ledger.has("--use-layer-wise-distributed-optimizer")
    return asked(ledger) and (layers or _said(ledger, "--optimizer") == "dist_muon")


def optimizer(ledger: Ledger, tensor: int) -> dict[str, Any]:
    """`optimizer.kind` and `optimizer.muon`; empty for another optimizer.

    Args:
        ledger: The command's.
        tensor: Its tensor-parallel ranks.
    """
    if not asked(ledger):
        for name in (*_FLAGS, "--use-layer-wise-distributed-optimizer"):
            ledger.ignore(name, "it acts with --optimizer muon or dist_muon")
        return {}
    found = {
        "momentum": ledger.number("--muon-momentum", 0.95),
        "nesterov": ledger.has("--muon-use-nesterov"),
        "rounds": ledger.integer("--muon-num-ns-steps", 5, least=1),
        "update_rms": ledger.number("--muon-extra-scale-factor", 1.0),
    }
    for name, key in (
        ("--muon-momentum", "momentum"),
        ("--muon-use-nesterov", "nesterov"),
        ("--muon-num-ns-steps", "rounds"),
        ("--muon-extra-scale-factor", "update_rms"),
    ):
        ledger.carry(name, f"optimizer.muon.{key}")
    ledger.lost_note(
        "--optimizer",
        "an MLP's gate and what it gates are orthogonalised together there, here each by itself",
        "none: each is a matrix of the model",
    )
    if _said(ledger, "--muon-scale-mode", "spectral") == "spectral":
        ledger.ignore("--muon-scale-mode", "updates are scaled by the root of the longer side")
    ledger.lose(
        "--muon-scale-mode",
        "updates are scaled by the root of the longer side, as by spectral",
        "choose optimizer.muon.update_rms and the learning rate anew",
    )
    if tensor > 1 and _said(ledger, "--muon-tp-mode", "blockwise") == "blockwise":
        why = "parts of a matrix on tensor-parallel ranks are orthogonalised as the whole that they are"
        if ledger.has("--muon-tp-mode"):
            ledger.lose("--muon-tp-mode", why, "none: steps depend on the layout by rounding alone")
        else:
            ledger.lose_default("--muon-tp-mode blockwise", why, "none: steps are the same on every layout")
    ledger.ignore("--muon-tp-mode", "parts of a matrix on tensor-parallel ranks are gathered")
    ledger.lose(
        "--muon-no-split-qkv", "queries, keys and values are orthogonalised each by themselves", "none"
    )
    ledger.ignore("--muon-fp32-matmul-prec", "matrices are orthogonalised in bf16 on GPUs")
    ledger.carry("--optimizer", "optimizer.kind")
    ledger.carry("--use-layer-wise-distributed-optimizer", "parallel.distributed_optimizer")
    return {"kind": "muon", "muon": found}
