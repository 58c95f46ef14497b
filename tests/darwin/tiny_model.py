"""A model of a hundred thousand parameters, trained here to answer a few short prompts, and served by our own server.

It is no good at anything: it has learnt the form of answers, and some of when which is due. So its answers are a real
model's, with all that gates are for, and cost milliseconds.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_davinci.darwin.chunks import cut
from megatron_davinci.darwin.context_gates import sentences_of
from megatron_davinci.darwin.dialogue_gates import Turn, written
from megatron_davinci.darwin.edits import numbered
from megatron_davinci.darwin.prompts import load_prompt, mark_for
from tests.darwin.making import prose

VOCABULARY, LENGTH, CHUNK, ANSWER = 512, 256, 200, 40
STEPS, STEPS_FOR_ALL = 40, 300
EDIT = """name: tiny_edit
version: 1
task: edit
user: |
  <{{mark}}>
  {{passage}}
  </{{mark}}>
  Which lines go?
"""
QUOTE = """name: tiny_quote
version: 1
task: quote
user: |
  {{related}}
  <{{mark}}>
  {{passage}}
  </{{mark}}>
  What to quote?
"""
AGENT = """name: tiny_{0}
version: 1
task: agent
user: |
  <{{{{mark}}}}>
  {{{{passage}}}}
  </{{{{mark}}}}>
  {{{{dialogue}}}}
  {{{{speaker}}}} {1}:
"""
JUDGE = """name: tiny_judge
version: 1
task: judge_dialogue
user: |
  <{{mark}}>
  {{passage}}
  </{{mark}}>
  {{dialogue}}
  Is it good?
"""
# What the two agents have learnt to say, whatever the document: in Python's help these words are mostly grounded.
SAID = [
    "What does an expression do with an object?",
    "It evaluates the object, and the value is its result.",
    "Which name is bound to the value in a statement?",
    "The statement binds a name in the local scope of a function.",
]


def pages(count: int, first: int = 0) -> list[str]:
    """Real prose with page numbers in it."""
    texts = []
    for number, text in enumerate(prose()[30 + first : 30 + first + count]):
        draw = random.Random(number + first)
        parts = text.split("\n\n")
        for at in sorted(draw.sample(range(len(parts) + 1), min(3, len(parts))), reverse=True):
            parts.insert(at, f"Page {draw.randrange(1, 400)}")
        texts.append("\n\n".join(parts))
    return texts


def prompt_files(folder: Path) -> dict[str, Path]:
    """The prompts that the model knows, as files."""
    files = {"edit": EDIT, "quote": QUOTE, "judge": JUDGE}
    files |= {"student": AGENT.format("student", "asks"), "teacher": AGENT.format("teacher", "says")}
    for name, text in files.items():
        (folder / f"tiny_{name}.yaml").write_text(text)
    return {name: folder / f"tiny_{name}.yaml" for name in files}


def lessons(folder: Path, count: int, seed: int, every_kind: bool = False) -> Iterator[tuple[str, str]]:
    """Prompts as the server lays them out, and answers as they should be; of `edit` alone, or of all kinds."""
    draw = random.Random(seed)
    edit = load_prompt("tiny_edit.yaml", folder, frozenset({"edit"}))
    passages = [chunk.text for text in pages(40, 20) for chunk in cut(text, CHUNK) if chunk.text]
    begun = [passage for passage in passages if passage.startswith("Page ")]
    ask = {
        name: load_prompt(f"tiny_{name}.yaml", folder, frozenset({task}))
        for name, task in (
            ("quote", "quote"),
            ("student", "agent"),
            ("teacher", "agent"),
            ("judge", "judge_dialogue"),
        )
    }
    for number in range(count):
        passage = draw.choice(begun if number % 2 else passages)
        mark = mark_for(passage)
        kind = number % 4 if every_kind else 0
        if kind < 2:
            lines = [n for n, line in enumerate(passage.split("\n"), 1) if line.startswith("Page ")]
            calls = [f"remove_lines({n}, {n})" for n in lines] or ["keep_all()"]
            [message] = edit.messages(passage=numbered(passage), mark=mark)
            said = f"<{mark}>\n" + "\n".join(calls) + f"\n</{mark}>"
        elif kind == 2:
            related = sentences_of([draw.choice(passages)[:120]])
            [message] = ask["quote"].messages(passage=passage[:120], mark=mark, related=related)
            said = f"<{mark}>\nquote(1, 1)\n</{mark}>"
        else:
            turns = [
                Turn(("Student", "Teacher")[n % 2], text) for n, text in enumerate(SAID[: number // 4 % 5])
            ]
            slots = {
                "passage": passage[:100],
                "mark": mark,
                "dialogue": written(turns) or "(nothing yet: you begin)",
            }
            if len(turns) == len(SAID):
                [message], said = ask["judge"].messages(**slots), "YES"
            else:
                speaker = ("student", "teacher")[len(turns) % 2]
                [message] = ask[speaker].messages(**slots, speaker=speaker.capitalize())
                said = f"<turn>{SAID[len(turns)]}</turn>"
        yield f"{message['content']}\n\n", said


def write_run(root: Path, every_kind: bool = False) -> Path:
    """`root/run`, trained to edit, which is enough for level 4, or for all kinds of prompts; returns it."""
    from megatron_davinci.config import dump_config, validate
    from megatron_davinci.data import IndexedDatasetWriter, Manifest, Shard
    from megatron_davinci.data.tokenizer import Tokenizer, train_bpe
    from tests.ranks import run_ranks
    from tests.tiny import train_here

    root.mkdir(parents=True, exist_ok=True)
    prompt_files(root)
    steps, batch = (STEPS_FOR_ALL, 4) if every_kind else (STEPS, 2)
    taught = list(lessons(root, 2 * batch * steps, 0, every_kind))
    texts = root / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": one + other}) + "\n" for one, other in taught))
    train_bpe([texts], VOCABULARY, root / "tokenizer")
    tokenizer = Tokenizer.load(root / "tokenizer")
    folder = root / "data"
    folder.mkdir()
    with IndexedDatasetWriter(folder / "shard-00000", np.uint16, mask=True) as writer:
        for asked, said in zip(*(tokenizer.encode_batch(list(texts)) for texts in zip(*taught)), strict=True):
            loss = np.arange(len(asked) + len(said) + 1) >= len(asked)
            writer.add_document([*asked.tolist(), *said.tolist(), tokenizer.eod_id], loss=loss)
    Manifest(
        name="lessons",
        domain="lessons",
        dtype="uint16",
        vocab_size=VOCABULARY,
        eod_id=tokenizer.eod_id,
        tokenizer_sha256=tokenizer.sha256,
        shards=(Shard.of("shard-00000", writer.written),),
    ).save(folder)
    settings: dict[str, Any] = {
        "run": {"directory": str(root / "run"), "seed": 1},
        "model": {
            "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2,
            "ffn_hidden_size": 128, "vocab_size": VOCABULARY, "max_sequence_length": LENGTH,
        },
        "parallel": {"device": "cpu"},
        "data": {
            "sequence_length": LENGTH, "tokenizer": str(root / "tokenizer"),
            "sources": {"lessons": {"path": str(folder)}},
        },
        "curriculum": [
            {
                "name": "only", "tokens": steps * batch * LENGTH,
                "mixture": {"lessons": 1.0}, "global_batch_size": batch,
                "learning_rate": {"shape": "cosine", "peak": 8e-3, "end": 5e-4, "warmup_steps": 10},
            }
        ],
        "train": {"micro_batch_size": batch, "precision": "fp32", "threads": 1},
        "logging": {"progress": "none", "tensorboard": False},
    }  # fmt: skip
    run_ranks(1, train_here, settings)
    (root / "run/config.yaml").write_text(dump_config(validate(settings, "tests/darwin")))
    return root / "run"


def serve_here(run: str, address: str, batch: int) -> int:
    """`davinci serve`, in a rank's process; the first line that it prints goes into the file `address`."""
    import contextlib
    import os

    from megatron_davinci.cli.main import main

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    words = ["serve", run, "--port", "0", "--name", "tiny", "--batch", str(batch), "train.threads=1"]
    with open(address, "w") as file, contextlib.redirect_stdout(file):
        return main(words)


@contextmanager
def served(run: Path, batch: int = 1) -> Iterator[str]:
    """The model behind our server in a process of its own; gives the url."""
    from tests.ranks import start_ranks

    address = run.parent / "address"
    address.unlink(missing_ok=True)
    [(process, connection)] = start_ranks(1, serve_here, str(run), str(address), batch)
    try:
        until = time.monotonic() + 300
        while not (address.is_file() and "http" in address.read_text()):
            assert process.is_alive() and time.monotonic() < until, "the server did not start"
            time.sleep(0.02)
        yield address.read_text().split()[1].rstrip(",")
    finally:
        process.terminate()
        process.join(20)
        if process.is_alive():
            process.kill()
        connection.close()
