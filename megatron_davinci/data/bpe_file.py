"""What a `tokenizer.json` must say for gigatoken to give the ids of `tokenizers`."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any


def why_not(content: bytes) -> str | None:
    """Why gigatoken would not give the reference's ids for a `tokenizer.json`; None if it would.

    It passes over fields that it does not know, so that each is asked about here: the model is byte-level BPE
    without dropout, prefixes, suffixes and double entries; the normaliser is NFC or none; the pre-tokeniser is one
    split by a regular expression, isolated, and the byte alphabet. Whether it knows the expression it says itself.
    """
    file: dict[str, Any] = json.loads(content)
    model = file.get("model") or {}
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        return f"a model of type {model.get('type')}{', byte_fallback' if model.get('byte_fallback') else ''}"
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            return f"model.{name} = {model[name]!r}"
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges", [])]
    if len(set(merges)) != len(merges):
        return "a merge that is listed twice"
    alphabet, vocabulary = _byte_alphabet(), model.get("vocab", {})
    names = {token["content"] for token in file.get("added_tokens") or []}
    strange = set().union("".join(vocabulary)) - alphabet
    for token in vocabulary if strange else ():
        if not strange.isdisjoint(token) and token not in names:
            return f"the token {token!r}, which is not written in the byte alphabet"
    missing = alphabet - vocabulary.keys()
    if missing:
        return f"no token for the byte that is written {min(missing)!r}"
    return _strange_normalizer(file.get("normalizer")) or _strange_pre_tokenizer(file.get("pre_tokenizer"))


def _strange_normalizer(normalizer: dict[str, Any] | None) -> str | None:
    parts = [normalizer] if normalizer else []
    if normalizer and normalizer.get("type") == "Sequence":
        parts = normalizer.get("normalizers", [])
    strange = [part.get("type") for part in parts if part.get("type") != "NFC"]
    return f"a normalizer {strange[0]}" if strange else None


def _strange_pre_tokenizer(pre: dict[str, Any] | None) -> str | None:
    if not pre:
        return "no pre_tokenizer"
    parts = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    *splits, last = parts or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") is not False:
        return "a pre_tokenizer that does not end in ByteLevel without a prefix space"
    if bool(splits) == bool(last.get("use_regex", True)):
        return "a pre_tokenizer that splits twice, or never"
    if len(splits) > 1:
        return "a pre_tokenizer with several splits"
    for split in splits:
        if split.get("type") != "Split" or "Regex" not in (split.get("pattern") or {}):
            return f"a pre_tokenizer {split.get('type')}"
        if split.get("behavior") != "Isolated" or split.get("invert"):
            return "a split that does not keep all of its pieces"
    return None


@lru_cache(maxsize=1)
def _byte_alphabet() -> set[str]:
    """The 256 characters that stand for bytes in a byte-level vocabulary."""
    from tokenizers import pre_tokenizers

    return set(pre_tokenizers.ByteLevel.alphabet())
