"""Encoders: texts to ids in arrays, by `tokenizers` (the reference) or by `gigatoken`, which is much faster.

gigatoken (https://github.com/marcelroed/gigatoken) encodes byte-level BPE some thirty times as fast. Three things
about it decide how it is used here:

- It turns the name of a special token that stands in a text into that token, and has no switch for it; so it is built
  from a copy of `tokenizer.json` without added tokens, and the end of a document is appended by who writes the ids.
- It passes over parts of `tokenizer.json` that it does not know; so `why_not` says what files it may be given, and
  `first_difference` holds it against the reference before it is trusted.
- Its Unicode tables are newer than those of `tokenizers`, whose NFC does not know the combining marks of the last ten
  years; so a text with a character that is not settled (`settled_characters`) goes to the reference.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.data.bpe_file import why_not as why_not
from megatron_davinci.data.tokenizer import LateTokenizer, Tokenizer
from megatron_davinci.errors import ConfigError, DataError, EnvironmentProblem

Backend = Literal["auto", "gigatoken", "tokenizers"]

# gigatoken keeps every distinct word that it has met. Past this much it is built anew, which takes a tenth of a
# second; real text fills it once in some hundred megabytes or more.
CACHE_BYTES = 12 << 20
_SHORT = 300  # bytes a text, on average of a batch


class Encoded(NamedTuple):
    """The ids of several texts, one after the other.

    Attributes:
        ids: [tokens] uint32.
        lengths: [texts] int64, tokens of each.
    """

    ids: NDArray[np.uint32]
    lengths: NDArray[np.int64]


class Encoder(Protocol):
    """What turns texts into ids. No text's ids hold the end-of-document token."""

    name: str

    def encode(self, texts: Sequence[str]) -> Encoded:
        """The ids of each text, without an end-of-document token."""
        ...


class ReferenceEncoder:
    """Encodes by the `tokenizers` library, on as many threads as `RAYON_NUM_THREADS` says."""

    def __init__(self, tokenizer: Tokenizer | LateTokenizer) -> None:
        self._tokenizer = tokenizer
        self.name = f"tokenizers {metadata.version('tokenizers')}"

    def encode(self, texts: Sequence[str]) -> Encoded:
        """The ids of each text, without an end-of-document token."""
        each = self._tokenizer.encode_batch(texts)
        lengths = np.array([len(ids) for ids in each], np.int64)
        ids = np.concatenate(each).astype(np.uint32) if each else np.empty(0, np.uint32)
        return Encoded(ids, lengths)


class FastEncoder:
    """Encodes by gigatoken, on the calling thread.

    Some texts go to the reference: those with an added token which is not special (`<think>` of Qwen3, say), since
    the reference finds such tokens in text, and those with a character that is not settled.

    Args:
        tokenizer: The tokenizer; see `why_not` for those that can be given.
        asked: It is known that it can be given.

    Raises:
        ConfigError: The tokenizer is not one that gigatoken encodes exactly.
        EnvironmentProblem: gigatoken is not installed.
    """

    def __init__(self, tokenizer: Tokenizer | LateTokenizer, *, asked: bool = False) -> None:
        reason = None if asked else why_not(tokenizer.content)
        if reason is not None:
            raise ConfigError(
                "gigatoken cannot stand in for this tokenizer.",
                where="backend",
                found=reason,
                expected="byte-level BPE as GPT-2, Llama 3 and Qwen write it",
                do="use backend auto or tokenizers",
            )
        content = json.loads(tokenizer.content)
        ordinary = [token for token in content.get("added_tokens") or [] if not token.get("special")]
        names = [token["content"] for token in ordinary if token["content"] != tokenizer.eod_token]
        self._normalizes = content.get("normalizer") is not None
        if self._normalizes:
            # The reference composes a token's name as it does the text that it looks in.
            names = list(dict.fromkeys([*names, *(unicodedata.normalize("NFC", name) for name in names)]))
        self._added = re.compile("|".join(map(re.escape, names))) if names else None
        # Ids above those of the vocabulary belong to added tokens; without them nothing gives such an id.
        self._json = json.dumps(content | {"added_tokens": [], "post_processor": None}, ensure_ascii=False)
        self._vocab_size = tokenizer.vocab_size
        self._reference = ReferenceEncoder(tokenizer)
        self._build()
        self.name = f"gigatoken {metadata.version('gigatoken')}"

    def _build(self) -> None:
        try:
            import gigatoken
        except ImportError as error:
            raise EnvironmentProblem(
                "gigatoken is not installed.",
                found=error,
                do="pip install 'megatron-davinci[data]', or use backend tokenizers",
            ) from error
        self._backend: Any = None  # the old one's cache goes first
        _return_freed_memory()
        try:
            self._backend = gigatoken.Tokenizer.from_json(self._json)
        except Exception as error:  # the library raises whatever its parser raised
            raise ConfigError(
                "gigatoken does not know this tokenizer.",
                where="backend",
                found=error,
                do="use backend auto or tokenizers",
            ) from error
        self._resident = resident_bytes()

    def encode(self, texts: Sequence[str]) -> Encoded:
        """The ids of each text, without an end-of-document token.

        Raises:
            DataError: An id came out that the vocabulary does not have.
        """
        if resident_bytes() - self._resident > CACHE_BYTES:
            self._build()
        raw = [text.encode() for text in texts]
        foreign = unsettled(b"".join(raw))
        ends = np.cumsum([len(one) for one in raw]) if len(foreign) else np.empty(0, np.int64)
        apart = set(np.searchsorted(ends, foreign, side="right").tolist())
        if self._added is not None:
            apart |= {n for n, text in enumerate(texts) if self._holds_added(text)}
        return self._encode_mixed(texts, raw, sorted(apart)) if apart else self._encode(raw)

    def _encode(self, raw: Sequence[bytes]) -> Encoded:
        if not raw:
            return Encoded(np.empty(0, np.uint32), np.empty(0, np.int64))
        if sum(map(len, raw)) > _SHORT * len(raw):
            each = [self._backend.encode(one) for one in raw]
            ids, lengths = np.concatenate(each), np.array([len(one) for one in each], np.int64)
        else:
            # Faster for many short texts; but it loads the awkward library, which takes half a second.
            layout = self._backend.encode_batch(raw, parallel=False).layout
            offsets = np.asarray(layout.offsets.data, np.int64)
            ids, lengths = np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)
        if len(ids) and int(ids.max()) >= self._vocab_size:
            raise DataError(
                "An id came out of the encoder that the vocabulary does not have.",
                where=self.name,
                found=int(ids.max()),
                expected=f"0 to {self._vocab_size - 1:,}",
                do="use backend tokenizers, and report this",
            )
        return Encoded(ids, lengths)

    def _holds_added(self, text: str) -> bool:
        assert self._added is not None
        if self._added.search(text):
            return True
        # A few characters become ASCII when composed: the Kelvin sign a K.
        if not self._normalizes or text.isascii() or unicodedata.is_normalized("NFC", text):
            return False
        return self._added.search(unicodedata.normalize("NFC", text)) is not None

    def _encode_mixed(self, texts: Sequence[str], raw: Sequence[bytes], apart: list[int]) -> Encoded:
        slow = set(apart)
        fast = self._encode([one for n, one in enumerate(raw) if n not in slow])
        reference = self._reference.encode([texts[n] for n in apart])
        pieces: list[NDArray[np.uint32]] = []
        parts = {True: _rows(reference), False: _rows(fast)}
        for n in range(len(texts)):
            pieces.append(next(parts[n in slow]))
        return Encoded(np.concatenate(pieces), np.array([len(piece) for piece in pieces], np.int64))


def _rows(encoded: Encoded) -> Any:
    ends = np.cumsum(encoded.lengths)
    return (encoded.ids[end - length : end] for end, length in zip(ends, encoded.lengths))


@lru_cache(maxsize=1)
def settled_characters() -> NDArray[np.bool_]:
    """The characters of which all versions of Unicode in use say the same, as far as encoding asks: [0x110000].

    It asks for the class (letter, mark, number, space, other) and for the composed form. Both are fixed once a
    character is assigned (Unicode's stability policies), so those of Unicode 3.2, which Python keeps, are settled;
    so are newer symbols and punctuation without a decomposition: to a version that lacks them they are "other" too.
    """
    old = unicodedata.ucd_3_2_0

    def is_one(character: str) -> bool:
        now, then = unicodedata.category(character), old.category(character)
        if then == "Cn":
            return now[0] in "SP" and not unicodedata.decomposition(character)
        return _CLASS.get(now[0]) == _CLASS.get(then[0])

    settled = np.zeros(0x110000, np.bool_)
    for first, end in _LOOKED_UP:
        settled[first:end] = [is_one(chr(point)) for point in range(first, end)]
    for first, end in _WHOLE_BLOCKS:
        settled[first:end] = True
    return settled


def is_settled(text: str) -> bool:
    """Whether a text has settled characters only."""
    return not len(unsettled(text.encode()))


def unsettled(text: bytes) -> NDArray[np.intp]:
    """Where characters that are not settled begin in a text, which is valid UTF-8: [n] bytes, in no order."""
    if text.isascii():
        return np.empty(0, np.intp)
    table = settled_characters()
    found = []
    for first in range(0, len(text), _LOOKED_AT):
        # Characters that begin here may end in the next bytes.
        octets = np.frombuffer(text[first : first + _LOOKED_AT + 3], np.uint8)
        leads = np.flatnonzero(octets[:_LOOKED_AT] >= 0xC0)
        where, points = _code_points(octets, leads)
        settled = table[points]
        if not settled.all():
            found.append(first + where[~settled])
    return np.concatenate(found) if found else np.empty(0, np.intp)


def _code_points(
    octets: NDArray[np.uint8], leads: NDArray[np.intp]
) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """Characters of two bytes and more, those of a length together: where they begin, and which they are."""
    first = octets[leads]
    where, found = [], []
    for length, low, high in ((2, 0xC0, 0xE0), (3, 0xE0, 0xF0), (4, 0xF0, 0xF8)):
        here = leads[(first >= low) & (first < high)]
        points = octets[here].astype(np.int64) - low
        for n in range(1, length):
            points = (points << 6) | (octets[here + n] & 0x3F)
        where.append(here)
        found.append(points)
    return np.concatenate(where), np.concatenate(found)


_LOOKED_AT = 1 << 18  # bytes in one go
# Where settled characters are looked up one by one: in the basic plane but for its large blocks, among mathematical
# letters and pictographs.
_LOOKED_UP = (
    (0x0000, 0x4E00),
    (0x9FA6, 0xAC00),
    (0xD7A4, 0xD800),
    (0xF900, 0x10000),
    (0x1D400, 0x1D800),
    (0x1F000, 0x1FB00),
)
# Blocks that are settled as a whole: ideographs of Unicode 3.0 and 3.1, Hangul syllables, private use.
_WHOLE_BLOCKS = (
    (0x4E00, 0x9FA6),
    (0xAC00, 0xD7A4),
    (0xE000, 0xF900),
    (0x20000, 0x2A6D7),
    (0xF0000, 0xFFFFE),
    (0x100000, 0x10FFFE),
)
_CLASS = {"L": "letter", "M": "mark", "N": "number", "Z": "space"}


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


def _return_freed_memory() -> None:
    """Give what malloc holds back to the system: the next cache would fill it unseen before it is counted."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


class Difference(NamedTuple):
    """Where two encoders part ways.

    Attributes:
        text: The number of the text.
        character: In the text, from 0 on, where the first other token begins.
        found: The id there, or None past the end.
        expected: The reference's id there, or None past the end.
    """

    text: int
    character: int
    found: int | None
    expected: int | None


def first_difference(encoder: Encoder, tokenizer: Tokenizer, texts: Sequence[str]) -> Difference | None:
    """The first id, if any, that `encoder` gives otherwise than the reference.

    Args:
        encoder: What is held against the reference.
        tokenizer: The reference.
        texts: What both encode.
    """
    found = encoder.encode(texts)
    expected = ReferenceEncoder(tokenizer).encode(texts)
    if np.array_equal(found.ids, expected.ids) and np.array_equal(found.lengths, expected.lengths):
        return None
    for n, (ours, theirs) in enumerate(zip(_rows(found), _rows(expected))):
        if np.array_equal(ours, theirs):
            continue
        shared = min(len(ours), len(theirs))
        unequal = np.flatnonzero(ours[:shared] != theirs[:shared])
        at = int(unequal[0]) if len(unequal) else shared
        spans = tokenizer.offsets(texts[n])
        return Difference(
            n,
            spans[at][0] if at < len(spans) else len(texts[n]),
            int(ours[at]) if at < len(ours) else None,
            int(theirs[at]) if at < len(theirs) else None,
        )
    return None


def nasty_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts on which encoders have been seen to differ, and every code point of the basic plane but surrogates."""
    names = [token["content"] for token in json.loads(tokenizer.content).get("added_tokens") or []]
    texts = [
        *_NASTY,
        *(f"a{name}b {name}{name}\n{name}" for name in names[:64]),
        "".join(names[:64]),
    ]
    points = [chr(point) for point in range(0x10000) if not 0xD800 <= point < 0xE000]
    texts += ["".join(points[first : first + 512]) for first in range(0, len(points), 512)]
    texts += [" a".join(points[first::977]) for first in range(0, 977, 120)]
    return texts


_NASTY = (
    "",
    " ",
    "\x00",
    "\r\n\r\n \t \u00a0\u2003\u3000\u2028\u0085 x",
    "  leading and trailing  ",
    " " * 4097,
    "a" * 4097,
    "ab" * 700 + "!" * 700 + "\n" * 700 + "7" * 700,
    "I'm we'LL it'S don\u2019t 'tis ''re O'Reilly's 's's",
    "1234567890 \u0661\u0662\u0663 \u00bd\u00b2\u2167 \U0001d7d8\U0001d7ff 3.14e-10",
    "e\u0301 \u00e9 a\u0323\u0307 a\u0307\u0323 \u0344 \u1e9b\u0323 \u2126\u212a\u212b \u037e \u1fef",
    "\u0915\u0958 \u0dd9\u0dcf \u09c7\u09be \uac00\u11a8 \u1100\u1161\u11a8 \ufb1d\u05b4 \u2adc \U0001d15e",
    "n\u0303" * 200 + "\u0300" * 200,
    "\u6570\u636e\u3067\u3059\u3002\uc548\ub155 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0645\u0631\u062d\u0628\u0627",
    "\u05e9\u05c1\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947",
    "\u1019\u1004\u103a\u1039\u1002\u101c\u102c\u1015\u102b",
    "\U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f3fd\ufe0f \U0001f1e9\U0001f1ea1\ufe0f\u20e3",
    "\ufeffx\u200b\u200e\u202e\u00adx\ufffd\uffff\U0010ffff\ue000\U000e0041",
    "\tif (x[i]!==-1){\n\t\treturn `${y}`;//\u2192\r\n\t}\r\n\n\n  }  \n",
    "https://example.org/a_b-c?d=%20&e=\u00fc#f  <b>&amp;</b> \\u0041 \\n {{x}} __init__ ---===***",
)


def choose(tokenizer: Tokenizer, backend: Backend = "auto") -> tuple[Encoder, str | None]:
    """The encoder for a tokenizer, and one line that says why it is not the fast one, if it is not.

    Raises:
        ConfigError: `backend` is `gigatoken`, and it does not encode this tokenizer exactly.
        EnvironmentProblem: `backend` is `gigatoken`, and it is not installed.
    """
    if backend == "tokenizers":
        return ReferenceEncoder(tokenizer), None
    try:
        return FastEncoder(tokenizer), None
    except (ConfigError, EnvironmentProblem) as error:
        if backend == "gigatoken":
            raise
        detail = f" ({' '.join(str(error.found).split())[:200]})" if error.found else ""
        return ReferenceEncoder(tokenizer), f"Encoding by tokenizers, which is slower: {error.what}{detail}"
