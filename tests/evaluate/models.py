"""A run with a tokenizer and a checkpoint of a model that is not indifferent, and lm-eval tasks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_davinci.data.tokenizer import train_bpe
from tests.config import small
from tests.ranks import run_ranks

VOCABULARY = 320
LENGTH = 96
WORDS = (
    "river stone lamp garden winter paper music window bread silver morning letter bridge cloud forest "
    "table candle harbour needle summer winding engine copper meadow lantern thunder"
).split()


def sentence(generator: np.random.Generator, words: int) -> str:
    return " ".join(generator.choice(WORDS, words))


def write_run(root: Path, **model: Any) -> Path:
    """`root/run` with a checkpoint of step 0, `root/tokenizer`; returns the run directory."""
    generator = np.random.default_rng(0)
    texts = root / "texts.jsonl"
    lines = [{"text": sentence(generator, 12).capitalize() + "."} for _ in range(200)]
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    train_bpe([texts], VOCABULARY, root / "tokenizer")
    settings = settings_of(root, **model)
    (root / "run").mkdir()
    (root / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    run_ranks(1, _save, settings, root / "run" / "checkpoints")
    return root / "run"


def settings_of(root: Path, **model: Any) -> dict[str, Any]:
    settings = small.settings(
        model={
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 8,
            "num_query_groups": 2,
            "ffn_hidden_size": 96,
            "vocab_size": VOCABULARY + 8,
            "vocab_padding": 8,
            "max_sequence_length": LENGTH,
            **model,
        },
        data={"sequence_length": LENGTH, "tokenizer": str(root / "tokenizer")},
    )
    settings["run"]["directory"] = str(root / "run")
    return settings


def _save(settings: dict[str, Any], checkpoints: Path) -> None:
    from megatron_davinci.config import validate
    from tests.convert.ranks import build, save_chunks

    config = validate(settings, "tests/evaluate")
    save_chunks(build(config), config, checkpoints)


def write_tasks(folder: Path, items: int = 12, seed: int = 1) -> Path:
    """Three tasks of lm-eval on JSON lines: multiple choice with examples, likelihood of texts, generation."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    questions = [
        {
            "question": sentence(generator, int(generator.integers(3, 14))),
            "choices": [sentence(generator, int(generator.integers(1, 4))) for _ in range(4)],
            "answer": int(generator.integers(4)),
        }
        for _ in range(items)
    ]
    texts = [{"text": sentence(generator, int(n))} for n in generator.integers(2, 120, items)]
    for name, rows in (("questions", questions), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def data(name: str) -> dict[str, Any]:
        return {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
            "test_split": "test",
        }

    choice = {
        "task": "tiny_choice",
        **data("questions"),
        "output_type": "multiple_choice",
        "fewshot_split": "test",
        "num_fewshot": 1,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    text = {
        "task": "tiny_text",
        **data("texts"),
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    }
    generation = {
        "task": "tiny_generation",
        **data("questions"),
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["r", "."], "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choice, text, generation):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    return folder
