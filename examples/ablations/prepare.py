"""Text, tokenizer and sources for the designs of this folder, out of what is on the machine.

Six domains of real text, those of the curriculum study; the designs use four. What is whole already is kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "curriculum_study"))

from texts import prepare

from megatron_davinci.data.jsonl import Fields
from megatron_davinci.data.tokenize import Options, tokenize
from megatron_davinci.data.tokenizer import Tokenizer

FOLDER, VOCABULARY = Path("runs/ablations-data"), 1024


def main() -> None:
    """Write `runs/ablations-data`."""
    pools = prepare(FOLDER, VOCABULARY)
    parted = FOLDER / "qa.parted"
    if not (parted / "manifest.json").exists():
        # With a mask: what is question, and what is answer.
        fields = Fields("text", "prompt", "response")
        texts, tokenizer = [FOLDER / "text" / "qa.train.jsonl"], Tokenizer.load(FOLDER / "tokenizer")
        tokenize(texts, tokenizer, parted, "qa", "qa", Options(fields))
    print("tokens to train on: " + ", ".join(f"{name} {count:,}" for name, count in pools.items()))


if __name__ == "__main__":
    main()
