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
from megatron_davinci.darwin.edits import numbered
from megatron_davinci.darwin.prompts import load_prompt, mark_for
from tests.darwin.making import prose

VOCABULARY, LENGTH, CHUNK, ANSWER = 512, 256, 200, 40
STEPS = 60
EDIT = """name: tiny_edit
version: 1
task: edit
user: |
  <{{mark}}>
  {{passage}}
  </{{mark}}>
  Which lines go?
"""


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
    files = {"edit": EDIT}
    for name, text in files.items():
        (folder / f"tiny_{name}.yaml").write_text(text)
    return {name: folder / f"tiny_{name}.yaml" for name in files}


def lessons(folder: Path, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Prompts as the server lays them out, and answers as they should be."""
    draw = random.Random(seed)
    edit = load_prompt("tiny_edit.yaml", folder, frozenset({"edit"}))
    passages = [chunk.text for text in pages(40, 20) for chunk in cut(text, CHUNK) if chunk.text]
    begun = [passage for passage in passages if passage.startswith("Page ")]
    for number in range(count):
        passage = draw.choice(begun if number % 2 else passages)
        lines = [n for n, line in enumerate(passage.split("\n"), 1) if line.startswith("Page ")]
        calls = [f"remove_lines({n}, {n})" for n in lines] or ["keep_all()"]
        mark = mark_for(passage)
        [message] = edit.messages(passage=numbered(passage), mark=mark)
        yield f"{message['content']}\n\n", f"<{mark}>\n" + "\n".join(calls) + f"\n</{mark}>"


def write_run(root: Path, steps: int = STEPS) -> Path:
    """`root/run`, trained; returns the run directory."""
    from megatron_davinci.config import dump_config, validate
    from megatron_davinci.data import IndexedDatasetWriter, Manifest, Shard
    from megatron_davinci.data.tokenizer import Tokenizer, train_bpe
    from tests.ranks import run_ranks
    from tests.tiny import train_here

    root.mkdir(parents=True, exist_ok=True)
    prompt_files(root)
    taught = list(lessons(root, 4 * steps, seed=0))
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
                "name": "only", "tokens": steps * 2 * LENGTH, "mixture": {"lessons": 1.0}, "global_batch_size": 2,
                "learning_rate": {"shape": "cosine", "peak": 8e-3, "end": 5e-4, "warmup_steps": 10},
            }
        ],
        "train": {"micro_batch_size": 2, "precision": "fp32", "threads": 1},
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
