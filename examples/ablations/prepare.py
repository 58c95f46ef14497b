"""Text, tokenizer and sources for the designs of this folder, out of what is on the machine.

Six domains of real text, those of the curriculum study; the designs use four. Beside them what single designs
compare: questions with a mask, questions by subject, code of two Darwin levels (`variants.py`). What is whole already
is kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "curriculum_study"))

from texts import prepare
from variants import code_levels, pairs_alone, questions_by_subject

from megatron_davinci.data.tokenizer import Tokenizer

FOLDER, VOCABULARY = Path("runs/ablations-data"), 1024


def main() -> None:
    """Write `runs/ablations-data`."""
    pools = prepare(FOLDER, VOCABULARY)
    tokenizer = Tokenizer.load(FOLDER / "tokenizer")
    pools |= pairs_alone(FOLDER, tokenizer)
    pools |= questions_by_subject(FOLDER, tokenizer) | code_levels(FOLDER, tokenizer)
    print("tokens to train on: " + ", ".join(f"{name} {count:,}" for name, count in pools.items()))


if __name__ == "__main__":
    main()
