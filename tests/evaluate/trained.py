"""A run that was trained on some texts again and again, and what its suites come to when computed by hand."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_davinci.config import dump_config, validate
from megatron_davinci.data import IndexedDatasetWriter, Manifest, Shard
from megatron_davinci.data.tokenizer import Tokenizer, train_bpe
from tests.evaluate.models import VOCABULARY, sentence
from tests.ranks import run_ranks
from tests.tiny import train_here

LENGTH = 96
LONGEST = 320  # GSM8K generates 256 tokens
EPOCHS = 25
ITEMS = 4  # of each kind of task


def write_run(root: Path) -> Path:
    """`root/run`, trained on the texts of `root/seen.jsonl`; `root/unseen.jsonl` has others of the same kind."""
    settings = prepared(root)
    run_ranks(1, train_here, settings)
    (root / "run/config.yaml").write_text(dump_config(validate(settings, "tests/evaluate")))
    return root / "run"


def prepared(root: Path) -> dict[str, Any]:
    """Its settings, with texts, tokenizer and sources written."""
    generator = np.random.default_rng(5)
    texts = {name: [sentence(generator, 30) for _ in range(24)] for name in ("seen", "unseen", "held")}
    for name, of in texts.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in of))
    train_bpe([root / f"{name}.jsonl" for name in texts], VOCABULARY, root / "tokenizer")
    tokenizer = Tokenizer.load(root / "tokenizer")
    windows = {name: write_source(root / "data" / name, texts[name], tokenizer) for name in ("seen", "held")}
    return {
        "run": {"directory": str(root / "run"), "seed": 1},
        "model": {
            "num_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 128,
            "vocab_size": VOCABULARY,
            "max_sequence_length": LONGEST,
        },
        "parallel": {"device": "cpu"},
        "data": {
            "sequence_length": LENGTH,
            "tokenizer": str(root / "tokenizer"),
            "sources": {"seen": {"path": str(root / "data/seen")}},
            "validation": {"held": str(root / "data/held")},
        },
        "curriculum": [
            {
                "name": "only",
                "tokens": EPOCHS * windows["seen"] * LENGTH,
                "mixture": {"seen": 1.0},
                "global_batch_size": 4,
                "learning_rate": {"peak": 1e-2, "warmup_steps": 5},
            }
        ],
        "evaluation": {"every_steps": 100000, "sequences": 2, "tasks": ITEMS},
        "train": {"micro_batch_size": 4, "precision": "fp32", "threads": 1},
        "logging": {"progress": "none", "tensorboard": False},
    }


def write_source(folder: Path, texts: list[str], tokenizer: Tokenizer) -> int:
    """A source of texts; returns its windows."""
    folder.mkdir(parents=True)
    with IndexedDatasetWriter(folder / "shard-00000", np.uint16) as writer:
        for ids in tokenizer.encode_batch(texts):
            writer.add_document([*ids.tolist(), tokenizer.eod_id])
    Manifest(
        name=folder.name,
        domain=folder.name,
        dtype="uint16",
        vocab_size=VOCABULARY,
        eod_id=tokenizer.eod_id,
        tokenizer_sha256=tokenizer.sha256,
        shards=(Shard.of("shard-00000", writer.written),),
    ).save(folder)
    return (writer.written.tokens - 1) // LENGTH


def by_hand(run: Path, folder: Path) -> dict[str, dict[str, float]]:
    """The metrics of every task of the local suite: one item and one option at a time, no cache, float64."""
    import torch

    from megatron_davinci.cli.convert_to_hf import find
    from megatron_davinci.cli.eval_model import on_ranks, tokenizer_for

    found = find(str(run))
    tokenizer = tokenizer_for(found, None)
    with on_ranks(found, ["train.threads=1"], tokenizer, 1, 512) as measured:
        model = measured.engine.chunk

        def logs(ids: list[int]) -> np.ndarray:
            with torch.no_grad():
                logits = model(torch.tensor([ids]), None, None)[0].double().numpy()
            logits -= logits.max(1, keepdims=True)
            return logits - np.log(np.exp(logits).sum(1, keepdims=True))

        def likelihood(before: str, after: str) -> float:
            whole = tokenizer.encode_batch([before + after])[0].tolist()
            first = len(tokenizer.encode_batch([before])[0])
            rows = logs(whole[:-1])
            return sum(float(rows[place - 1, whole[place]]) for place in range(first, len(whole)))

        def bits(text: str) -> float:
            ids = [tokenizer.eod_id, *tokenizer.encode_batch([text])[0].tolist()]
            total, size = 0.0, LONGEST
            for first in range(0, len(ids) - 1, size):
                part = ids[first : first + size + 1]
                rows = logs(part[:-1])
                total -= sum(float(rows[place, token]) for place, token in enumerate(part[1:]))
            return total / math.log(2)

        def written(before: str) -> str:
            ids = tokenizer.encode_batch([before])[0].tolist()[-(LONGEST - 24) :]
            begun = len(ids)
            while len(ids) < begun + 24:
                token = int(logs(ids)[-1].argmax())
                if token == tokenizer.eod_id:
                    break
                ids.append(token)
                if "\n" in tokenizer.decode(ids[begun:]):
                    break
            return tokenizer.decode(ids[begun:]).split("\n")[0]

        metrics: dict[str, dict[str, float]] = {}
        for path in sorted(folder.glob("*.items.jsonl")):
            name = path.name.removesuffix(".items.jsonl")
            items, examples = (_rows(folder / f"{name}.{part}.jsonl") for part in ("items", "examples"))
            if name.startswith("bytes"):
                total = sum(bits(item["text"]) for item in items)
                metrics[name] = {"bits_per_byte,none": total / sum(len(i["text"].encode()) for i in items)}
            elif name.endswith("likelihood"):
                shown = "".join(one["text"] + one["options"][one["answer"]] + "\n\n" for one in examples)
                sums = [
                    [likelihood(shown + item["text"], option) for option in item["options"]] for item in items
                ]
                lengths = [[len(option) for option in item["options"]] for item in items]
                answers = [item["answer"] for item in items]
                metrics[name] = {
                    "acc,none": float(np.mean(np.argmax(sums, 1) == answers)),
                    "acc_norm,none": float(np.mean(np.argmax(np.array(sums) / lengths, 1) == answers)),
                }
            else:
                shown = "".join(f"{one['text']} {one['said']}\n\n" for one in examples)
                right = []
                for item in items:
                    match = re.search(item["pattern"], written(shown + item["text"]))
                    right.append((match[1].strip() if match else "") == item["said"])
                metrics[name] = {"exact_match,first": float(np.mean(right))}
    return metrics


def knowledge_by_hand(run: Path, made: Path) -> dict[str, float]:
    """Losses of persons and log-probabilities of facts: one at a time, no cache, float64."""
    import torch

    from megatron_davinci.cli.convert_to_hf import find
    from megatron_davinci.cli.eval_model import on_ranks, tokenizer_for
    from megatron_davinci.data.knowledge.biographies import ATTRIBUTES, biography
    from megatron_davinci.data.knowledge.corpus import read
    from megatron_davinci.data.knowledge.facts import probes

    found, knowledge = find(str(run)), read(made)
    tokenizer = tokenizer_for(found, None)
    with on_ranks(found, ["train.threads=1"], tokenizer, 1, 512) as measured:

        def log(before: str, after: str) -> float:
            whole = tokenizer.encode_batch([before + after])[0].tolist()
            first = len(tokenizer.encode_batch([before])[0]) if before else 1
            whole = whole if before else [tokenizer.eod_id, *whole]
            with torch.no_grad():
                logits = measured.engine.chunk(torch.tensor([whole[:-1]]), None, None)[0].double()
            rows = torch.log_softmax(logits, -1)
            return sum(float(rows[place - 1, whole[place]]) for place in range(first, len(whole)))

        generator = np.random.default_rng([knowledge.seed, 4])
        names, values = [], []
        for person in knowledge.persons():
            text, begins = biography(person, generator)
            names.append(-log("", person.name))
            values.append(-sum(log(text[: begins[a] - 1], f" {person.values[a]}") for a in ATTRIBUTES))
        asked = [one for one in probes(knowledge.made_up()) if one.kind == "semantic"]
        once = [log(one.before, one.answer) for one in asked if one.condition == "once"]
        return {
            "name_loss": float(np.mean(names)),
            "attribute_loss": float(np.mean(values)),
            "once": float(np.mean(once)),
        }


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_benchmarks(root: Path) -> Path:
    """A folder with a few items of four benchmarks, in folders of their names on the hub."""
    generator = np.random.default_rng(2)
    piqa = [
        {
            "goal": sentence(generator, 4),
            "sol1": sentence(generator, 3),
            "sol2": sentence(generator, 3),
            "label": n % 2,
        }
        for n in range(5)
    ]
    gsm = [{"question": f"{n} plus {n}?", "answer": f"It is {2 * n}. #### {2 * n}"} for n in range(12)]
    winogrande = [
        {
            "sentence": f"The {a} met the {b} and _ was late.",
            "option1": a,
            "option2": b,
            "answer": str(1 + n % 2),
        }
        for n, (a, b) in enumerate([("lamp", "stone"), ("river", "cloud"), ("bread", "paper")])
    ]
    mbpp = [
        {
            "task_id": n,
            "text": "Write a sum.",
            "code": "def f(a): return a",
            "test_setup_code": "",
            "test_list": ["assert f(1) == 1"] * 3,
        }
        for n in range(3)
    ]
    folders = {
        "baber/piqa": piqa,
        "openai/gsm8k": gsm,
        "allenai/winogrande": winogrande,
        "google-research-datasets/mbpp": mbpp,
    }
    for name, rows in folders.items():
        (root / name).mkdir(parents=True)
        for part in ("train", "validation", "test"):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (root / name / f"{part}.jsonl").write_text(lines)
    (root / "note.yaml").write_text(yaml.safe_dump({"made": "for a test"}))
    return root
