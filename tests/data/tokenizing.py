"""What the tests of tokenising share: tokenizers, inputs, and what a source holds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from megatron_davinci.data.indexed import IndexedDataset
from megatron_davinci.data.manifest import Manifest
from megatron_davinci.data.tokenizer import EOD, QWEN2_SPLIT, Tokenizer

EOD_ENTRY = {
    "content": EOD,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def documents(folder: Path, manifest: Manifest) -> list[list[int]]:
    return [
        dataset[i].tolist()
        for shard in manifest.shards
        for dataset in [IndexedDataset(folder / shard.prefix)]
        for i in range(len(dataset))
    ]


def telling_tokenizer(folder: Path, split: str = QWEN2_SPLIT, **changes: Any) -> Path:
    """A tokenizer whose ids tell how a text was split and composed, whatever its characters.

    Its merges join the last byte of any character to the ASCII that follows, and ASCII to the first byte of any
    that follows, which a vocabulary learnt from text does for a few characters only.
    """
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    written = _byte_characters()
    assert set(alphabet) == set(written.values())
    vocab = {written[value]: value for value in range(256)}
    merges: list[list[str]] = []
    pairs = [(ord(one), lead) for lead in range(0xC2, 0xF5) for one in " a1!'"]
    pairs += [(last, ord(one)) for last in range(0x80, 0xC0) for one in "a1!s'"]
    for pair in [*pairs, (ord("'"), ord("s")), (ord("a"), ord("b")), (ord(" "), ord("a"))]:
        left, right = (written[value] for value in pair)
        merges.append([left, right])
        vocab[left + right] = len(vocab)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": len(vocab), **EOD_ENTRY}],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    content |= changes
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def load_telling(folder: Path, **changes: Any) -> Tokenizer:
    return Tokenizer.load(telling_tokenizer(folder, **changes))


def _byte_characters() -> dict[int, str]:
    """The character of each byte: printable ones are their own, the others come after U+00FF in order."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in own]
    return {value: chr(value) for value in own} | {value: chr(256 + n) for n, value in enumerate(others)}
