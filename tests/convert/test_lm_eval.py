"""lm-eval scores an export as any model of the hub, and what it says is what transformers computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_davinci.cli.convert_to_hf import export
from megatron_davinci.data.tokenizer import train_bpe
from megatron_davinci.train import checkpoint_files
from tests.convert import ranks
from tests.ranks import run_ranks

TOKENS = 300
TEXT = "Every sample of a run is a function of one number, and so is the order in which a run that stops goes on."
ASKED = [
    ("Every sample of a run", " is a function of one number"),
    ("a run that stops", " goes on"),
    ("a run that stops", " does not"),
    ("", "So is the order."),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """An export of an untied model of two tensor ranks, with padding in its vocabulary and a tokenizer of its own."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{TEXT} {number}"}) + "\n" for number in range(50)))
    tokenizer = train_bpe([text], TOKENS, tmp_path / "tokenizer")
    model = {"vocab_size": 304, "vocab_padding": 304 - TOKENS, "tie_embeddings": False}
    run_ranks(2, ranks.save, tmp_path / "checkpoints", model, 2, 1, 1)
    checkpoint = checkpoint_files.step_folder(tmp_path / "checkpoints", 0)
    return export(str(checkpoint), tmp_path / "out", tokenizer=tokenizer)


def log_probabilities(model: Any, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every id but the first: its logarithmic probability, and whether it is the likeliest; by transformers."""
    with torch.no_grad():
        said = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    labels = torch.tensor(ids[1:])
    return said.gather(1, labels[:, None])[:, 0], said.argmax(-1) == labels


@pytest.mark.long
@pytest.mark.needs("lm_eval")
def test_log_likelihoods_are_those_of_transformers(folder):
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scored = get_model("hf").create_from_arg_string(
        f"pretrained={folder},dtype=float32", {"device": "cpu", "batch_size": 3}
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == TOKENS and scored.max_length == ranks.SIZES["max_sequence_length"]
    end = tokenizer.eos_token_id
    assert end == TOKENS - 1 == scored.prefix_token_id

    found = scored.loglikelihood([Instance("loglikelihood", {}, asked, n) for n, asked in enumerate(ASKED)])
    for (context, continuation), (said, greedy) in zip(ASKED, found, strict=True):
        before = tokenizer(context).input_ids or [end]
        ids = before + tokenizer(context + continuation).input_ids[len(before) if context else 0 :]
        each, likeliest = log_probabilities(model, ids)
        assert said == pytest.approx(float(each[len(before) - 1 :].sum()), rel=1e-5)
        assert greedy == bool(likeliest[len(before) - 1 :].all())
    assert len({round(said, 3) for said, _ in found}) == len(ASKED), "it tells them apart"

    # Text longer than the model's sequence, in windows that do not overlap.
    text = " ".join(f"{TEXT} {number}" for number in range(12))
    ids = tokenizer(text).input_ids
    length = scored.max_length
    assert len(ids) > 2 * length
    (rolled,) = scored.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    whole = 0.0
    for first in range(0, len(ids), length):
        window = ids[first : first + length]
        if len(window) == length:
            given = [end, *window] if first == 0 else ids[first - 1 : first + length]
            each, _ = log_probabilities(model, given)
        else:  # the last one is filled up with what came before it
            each, _ = log_probabilities(model, ids[len(ids) - length - 1 :])
            each = each[-len(window) :]
        whole += float(each.sum())
    assert rolled == pytest.approx(whole, rel=1e-5)


@pytest.mark.long
@pytest.mark.needs("lm_eval")
def test_a_task_of_choices_is_evaluated(folder, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [{"question": q, "choices": [good, bad], "answer": 0} for q, good, bad in QUESTIONS]
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    said = lm_eval.simple_evaluate(
        "hf",
        f"pretrained={folder},dtype=float32",
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
        log_samples=True,
    )
    assert said["n-samples"]["own"]["effective"] == len(rows)
    assert 0.0 <= said["results"]["own"]["acc,none"] <= 1.0


QUESTIONS = [
    ("Every sample of a run is", " a function of one number", " zebra"),
    ("a run that stops", " goes on", " xylophone"),
]
