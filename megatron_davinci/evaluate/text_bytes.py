"""How many bytes of text a token stands for, so that a loss can be said in bits a byte.

Nats a token depend on the tokenizer; bits a byte do not, and runs with different vocabularies are compared by them
(Gao et al., "The Pile", arXiv:2101.00027, section 3.1).
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

from megatron_davinci.data.tokenizer import Tokenizer


def bytes_of_tokens(tokenizer: Tokenizer) -> NDArray[np.int64] | None:
    """The bytes of text that each id stands for.

    They are exact for byte-level BPE, which writes each byte of the (normalised) text as one character of a token. A
    special token stands for no text.

    Args:
        tokenizer: The tokenizer.

    Returns:
        int64 `[vocab_size]`; None for a tokenizer of another kind, whose tokens do not have a length of their own.
    """
    content: dict[str, Any] = json.loads(tokenizer.content)
    if content["model"].get("type") not in (None, "BPE") or not _byte_level(content):
        return None
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    sizes = np.zeros(tokenizer.vocab_size, np.int64)
    for token, number in content["model"]["vocab"].items():
        if not alphabet.issuperset(token):
            return None
        sizes[number] = len(token)
    for added in content.get("added_tokens") or []:
        special = added.get("special") or added["id"] == tokenizer.eod_id
        sizes[added["id"]] = 0 if special else len(added["content"].encode())
    return sizes


def bits_per_byte(nats: float, size: int) -> float:
    """A sum of nats over `size` bytes of text, as bits a byte."""
    return nats / math.log(2) / size


def _byte_level(content: dict[str, Any]) -> bool:
    """Whether text becomes the characters that stand for bytes before it is merged, and they text when decoded."""

    def has(part: dict[str, Any] | None, inner: str) -> bool:
        parts = (part or {}).get(inner, [part or {}])
        return any(one.get("type") == "ByteLevel" for one in parts)

    return has(content.get("pre_tokenizer"), "pretokenizers") and has(content.get("decoder"), "decoders")
