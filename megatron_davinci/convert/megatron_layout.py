"""Flags of Megatron-LM that say how a model is cut, that it has experts, and what is told to others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_davinci.convert.megatron_ledger import Ledger

_FIRST, _LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
_PER_STAGE, _STAGES = "--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank"


_EXPERTS = {
    "--num-experts": "model.experts.number",
    "--moe-router-topk": "model.experts.top_k",
    "--moe-aux-loss-coeff": "model.experts.balance_coefficient",
    "--moe-z-loss-coeff": "model.experts.router_z_loss",
    "--moe-shared-expert-intermediate-size": "model.experts.shared_ffn_hidden_size",
    "--moe-ffn-hidden-size": "model.ffn_hidden_size",
    "--expert-model-parallel-size": "parallel.expert",
    "--expert-tensor-parallel-size": "parallel.expert_tensor",
}


def pipeline(ledger: Ledger, ranks: int, layers: int) -> dict[str, Any]:
    """Keys of `parallel` for interleaved and uneven stages.

    Args:
        ledger: The command's flags.
        ranks: Pipeline ranks.
        layers: The model's layers.
    """
    found: dict[str, Any] = {}
    if ranks < 2:
        for name in (_PER_STAGE, _STAGES, _FIRST, _LAST):
            ledger.ignore(name, "there is one pipeline rank")
        return found
    if chunks := _chunks(ledger, ranks, layers):
        found["virtual_pipeline"] = chunks
        ledger.carry(_PER_STAGE, f"parallel.virtual_pipeline: {chunks}")
        ledger.carry(_STAGES, "parallel.virtual_pipeline")
    first, last = ledger.integer(_FIRST, None, 1), ledger.integer(_LAST, None, 1)
    if first is None and last is None:
        return found
    if found.get("virtual_pipeline", 1) > 1:
        why, do = "chunks of interleaved stages are listed one by one", "write parallel.pipeline_layers"
        ledger.lose(_FIRST, why, do)
        ledger.lose(_LAST, why, do)
        return found
    middle = ranks - (first is not None) - (last is not None)
    left = layers - (first or 0) - (last or 0)
    if left < 0 or (left and not middle) or (middle and left % middle):
        ledger.problem(
            _FIRST, _LAST, expected=f"that the other {left} layers divide by the other {middle} stages"
        )
        return found
    stages = [left // middle] * middle if middle else []
    found["pipeline_layers"] = [*([first] if first else []), *stages, *([last] if last else [])]
    ledger.carry(_FIRST, "parallel.pipeline_layers")
    ledger.carry(_LAST, "parallel.pipeline_layers")
    return found


def _chunks(ledger: Ledger, ranks: int, layers: int) -> int | None:
    if ledger.has(_PER_STAGE) and ledger.has(_STAGES):
        ledger.problem(_PER_STAGE, _STAGES, expected="one of the two")
        return None
    if not ledger.has(_PER_STAGE):
        return ledger.integer(_STAGES, None, 1)
    each = ledger.integer(_PER_STAGE, None, 1)
    if each is None:
        return None
    if layers % ranks or layers // ranks % each:
        ledger.problem(
            _PER_STAGE, "--num-layers", "--pipeline-model-parallel-size", expected="layers that divide"
        )
        return None
    return layers // ranks // each


def experts(ledger: Ledger, model: dict[str, Any], parallel: dict[str, Any]) -> None:
    """Put the experts into the sections `model` and `parallel`, if the command has any."""
    number = ledger.integer("--num-experts")
    if not number or number < 2:
        for name in (
            "--num-experts",
            "--moe-router-load-balancing-type",
            "--moe-token-dispatcher-type",
            *_EXPERTS,
        ):
            ledger.ignore(name, "there are no experts")
        return
    section: dict[str, Any] = {
        "number": number,
        "top_k": ledger.integer("--moe-router-topk", 2, 1),
        "balance_coefficient": ledger.number("--moe-aux-loss-coeff", 0.0),
        "router_z_loss": ledger.number("--moe-z-loss-coeff", 0.0),
    }
    balance = ledger.text("--moe-router-load-balancing-type", "aux_loss")
    kinds = {"aux_loss": "micro_batch", "seq_aux_loss": "sequence", "none": "none"}
    section["balance"] = kinds.get(balance or "", "micro_batch")
    if balance in kinds:
        ledger.carry("--moe-router-load-balancing-type", "model.experts.balance")
    ledger.lose("--moe-router-load-balancing-type", "no such balance", "choose model.experts.balance")
    if shared := ledger.integer("--moe-shared-expert-intermediate-size"):
        section["shared_ffn_hidden_size"] = shared
    if size := ledger.integer("--moe-ffn-hidden-size", None, 1):
        model["ffn_hidden_size"] = size
        ledger.ignore("--ffn-hidden-size", "--moe-ffn-hidden-size says how large experts are")
    model["experts"] = section
    parallel["expert"] = ledger.integer("--expert-model-parallel-size", 1, 1)
    across = ledger.integer("--expert-tensor-parallel-size", None, 1)
    parallel["expert_tensor"] = parallel["tensor"] if across is None else across
    dispatcher = ledger.text("--moe-token-dispatcher-type", "allgather")
    if dispatcher in ("allgather", "alltoall"):
        parallel["expert_dispatcher"] = dispatcher
        ledger.carry("--moe-token-dispatcher-type", "parallel.expert_dispatcher")
    else:
        ledger.lose("--moe-token-dispatcher-type", "no such way", "choose parallel.expert_dispatcher")
    for name, to in _EXPERTS.items():
        ledger.carry(name, to)


def wandb(ledger: Ledger) -> dict[str, Any] | None:
    """The section `logging.wandb`; None if the command names no project."""
    project = ledger.text("--wandb-project")
    if not project:
        for name in ("--wandb-project", "--wandb-exp-name", "--wandb-entity"):
            ledger.ignore(name, "Megatron-LM uses Weights & Biases with --wandb-project only")
        return None
    found = {"project": project}
    ledger.carry("--wandb-project", "logging.wandb.project")
    for name, key in (("--wandb-exp-name", "name"), ("--wandb-entity", "entity")):
        if value := ledger.text(name):
            found[key] = value
            ledger.carry(name, f"logging.wandb.{key}")
    return found


def tokenizer_size(ledger: Ledger) -> int | None:
    """Tokens of a Hugging Face tokenizer that `--tokenizer-model` names by its folder; None if it is not here."""
    name = ledger.text("--tokenizer-model")
    if name is None or ledger.text("--tokenizer-type") != "HuggingFaceTokenizer":
        return None
    file = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    if file.suffix != ".json" or not file.is_file():
        return None
    try:
        content = json.loads(file.read_bytes())
        vocabulary = content["model"]["vocab"]
        # A dictionary of BPE and WordPiece, a list of pairs of Unigram.
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
        ids += [token["id"] for token in content.get("added_tokens") or []]
        return int(max(ids)) + 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        ledger.problem("--tokenizer-model", expected=f"a tokenizer in {file.name}, or --vocab-size N")
        return None
