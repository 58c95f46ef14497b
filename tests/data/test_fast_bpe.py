"""gigatoken beside the reference: the same ids, or it is not used."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.data import fast_bpe
from megatron_davinci.data.fast_bpe import (
    Encoded,
    FastEncoder,
    ReferenceEncoder,
    choose,
    first_difference,
    is_settled,
    nasty_texts,
    settled_characters,
    unsettled,
    why_not,
)
from megatron_davinci.data.tokenizer import EOD, QWEN2_SPLIT, Tokenizer, train_bpe
from megatron_davinci.errors import ConfigError, DataError
from tests.cases import cases, is_long
from tests.data.tokenizing import EOD_ENTRY, load_telling, telling_tokenizer, write_jsonl

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
NO_SPLIT = GPT2 | {"use_regex": False}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
THINK = EOD_ENTRY | {"content": "<think>", "special": False}
KELVIN = "\u212a"  # composes to K


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_telling(tmp_path_factory.mktemp("telling"))


@pytest.fixture(scope="module")
def pair(tokenizer: Tokenizer) -> tuple[FastEncoder, ReferenceEncoder]:
    return FastEncoder(tokenizer), ReferenceEncoder(tokenizer)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("trained")
    source = Path(fast_bpe.__file__).parent
    texts = [{"text": path.read_text()} for path in sorted(source.glob("*.py"))[:20]]
    return Tokenizer.load(train_bpe([write_jsonl(folder / "a.jsonl", texts)], 2000, folder))


def same(fast: FastEncoder, reference: ReferenceEncoder, texts: list[str]) -> None:
    found, expected = fast.encode(texts), reference.encode(texts)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_array_equal(found.ids, expected.ids)
    assert found.ids.dtype == np.uint32


# Pieces of text that meet each other in every order: marks that compose and that are reordered, Hangul letters,
# pictographs and their joiners, ideographs, controls, spaces of all kinds, contractions, names of special tokens.
PIECES = [
    *("a", "b", "A", "s", "'s", "'LL", "'", "1", "12", "\u0661", "\u00bd", "!", "...", "-", "_", "<", "|>"),
    *(EOD, "<|im_start|>"),
    *(" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2003", "\u3000", "\u0085", "\x0b", "\x00", "\x1f"),
    *("\x7f", "\ufeff"),
    *("e", "\u0301", "\u0300", "\u0323", "\u0345", "\u0334", "\u00e9", "\u1e9b", "\u212b", KELVIN, "\u037e"),
    *("\u1100", "\u1161", "\u11a8", "\uac00", "\u6570", "\u3042", "\u304b", "\u3099", "\uf900"),
    *("\u0e33", "\u094d", "\u093c"),
    *("\U0001f642", "\u200d", "\ufe0f", "\U0001f3fd", "\U0001f1e9", "\u20e3", "\U0001d7d8", "\U00020000", "\ue000"),
    *("\u0897", "\u088f", "\U000323b0", "\U0010ffff", "\ufffe", "\ufffd", "\u05d0", "\u05b4", "\u202e"),
]  # fmt: skip
mixed = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
texts = st.lists(st.one_of(mixed, mixed, st.text(max_size=20)), min_size=40, max_size=60)


@given(texts)
@cases(130)
def test_ids_are_those_of_the_reference(pair: tuple[FastEncoder, ReferenceEncoder], drawn: list[str]) -> None:
    same(*pair, drawn)


@given(texts)
@cases(15)
def test_so_with_a_vocabulary_from_text(trained: Tokenizer, drawn: list[str]) -> None:
    same(FastEncoder(trained), ReferenceEncoder(trained), drawn)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        *(pytest.param(changes, marks=pytest.mark.long) for changes in (
            {"split": LLAMA3}, {"pre_tokenizer": GPT2}, {"normalizer": None})),
    ],
)  # fmt: skip
def test_code_points_of_the_basic_plane_are_split_and_composed_alike(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    tokenizer = load_telling(tmp_path, **changes)
    some = range(0, 0x10000, 1 if is_long() else 5)
    points = [chr(point) for point in some if not 0xD800 <= point < 0xE000]
    texts = [f"{p} {p}a{p}1 {p}!a\u0345{p}\u0334'{p}s" for p in points]
    same(FastEncoder(tokenizer), ReferenceEncoder(tokenizer), texts)


@pytest.mark.long
@pytest.mark.parametrize("split", [QWEN2_SPLIT, LLAMA3])
def test_every_code_point_that_there_is(tmp_path: Path, split: str) -> None:
    tokenizer = load_telling(tmp_path, split=split)
    fast, reference = FastEncoder(tokenizer), ReferenceEncoder(tokenizer)
    for first in range(0x10000, 0x110000, 0x10000):
        block = map(chr, range(first, first + 0x10000))
        same(fast, reference, [f"a\u0345{p}\u0334 {p}a{p}1 {p}'s" for p in block])


def test_a_character_is_settled_if_no_version_of_unicode_says_otherwise() -> None:
    assert all(
        is_settled(text)
        for text in ("", "plain", "caf\u00e9 \u6570\u636e \u201cq\u201d", "e\u0301 \U0001f642")
    )
    # A combining mark of Unicode 16, a letter of 17, an unassigned code point, half a pair.
    assert not any(is_settled(f"a{c}") for c in ("\u0897", "\u088f", "\U000323b0", "\u0378", "\u05ff"))
    table = settled_characters()
    for point in np.flatnonzero(table[:0x10000]).tolist():
        now, then = unicodedata.category(chr(point)), unicodedata.ucd_3_2_0.category(chr(point))
        assert now[0] == then[0] or now[0] not in "LMNZ" or now[0] in "SP"


def test_whole_blocks_are_settled_as_their_characters_are_one_by_one() -> None:
    table, old = settled_characters(), unicodedata.ucd_3_2_0
    for first, end in fast_bpe._WHOLE_BLOCKS:
        points = range(first, min(end, first + 21_000))
        assert table[first:end].all()
        now = {unicodedata.category(chr(point)) for point in points}
        assert len(now) == 1 and now == {old.category(chr(point)) for point in points} and now <= {"Lo", "Co"}
    looked_up = {first for first, _ in fast_bpe._LOOKED_UP}
    assert not looked_up & {first for first, _ in fast_bpe._WHOLE_BLOCKS}
    covered = sorted((*fast_bpe._LOOKED_UP, *fast_bpe._WHOLE_BLOCKS, (0xD800, 0xE000)))
    plane = [block for block in covered if block[0] < 0x10000]
    assert [end for _, end in plane] == [*(first for first, _ in plane[1:]), 0x10000]


def test_a_text_longer_than_a_look_is_looked_at_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for look in range(1, 8):
        monkeypatch.setattr(fast_bpe, "_LOOKED_AT", look)
        assert is_settled("\u00e9" * 9)
        assert is_settled("a\u6570\U0001f642" * 9)
        for foreign in ("\u0897", "\U000323b0"):
            assert not is_settled("\u00e9" * 9 + foreign)
            assert not is_settled("a\u6570" * 5 + foreign + "a")


def test_only_texts_with_unsettled_characters_go_to_the_reference(
    pair: tuple[FastEncoder, ReferenceEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, reference = pair
    gone: list[str] = []

    class Telling:
        def encode(self, texts: list[str]) -> Encoded:
            gone.extend(texts)
            return reference.encode(texts)

    monkeypatch.setattr(fast, "_reference", Telling())
    same(
        fast,
        reference,
        ["", "\u0897", "caf\u00e9", "", "a\u0897\u0897", "b", "\u6570\U000323b0", "\u6570", ""],
    )
    assert gone == ["\u0897", "a\u0897\u0897", "\u6570\U000323b0"]


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_bytes_are_looked_at_as_the_characters_they_are(text: str) -> None:
    table = settled_characters()
    expected = [len(text[:n].encode()) for n, character in enumerate(text) if not table[ord(character)]]
    assert sorted(unsettled(text.encode()).tolist()) == expected


@pytest.mark.parametrize("normalized", [False, True])
def test_an_added_token_that_is_not_special_is_found_in_text_as_the_reference_finds_it(
    tmp_path: Path, normalized: bool
) -> None:
    added = [
        {"id": 700, **EOD_ENTRY},
        {"id": 701, **THINK, "normalized": normalized},
        {"id": 702, **THINK, "content": "OK", "normalized": normalized},
    ]
    content = json.loads((telling_tokenizer(tmp_path) / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {entry["content"]: entry["id"] for entry in added}
    content["added_tokens"] = added
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(tmp_path)
    fast, reference = FastEncoder(tokenizer), ReferenceEncoder(tokenizer)
    texts = ["plain", "a<think>b", "", "<think><think>", f"O{KELVIN}", "\u00e9<think>", f"<think>{EOD}", "x"]
    same(fast, reference, texts)
    assert 701 in fast.encode(["a<think>b"]).ids
    assert (702 in fast.encode([f"O{KELVIN}"]).ids) == normalized
    assert tokenizer.eod_id not in fast.encode(texts).ids


def test_an_added_token_whose_name_is_not_composed_is_found_where_it_is(tmp_path: Path) -> None:
    content = json.loads((telling_tokenizer(tmp_path) / "tokenizer.json").read_text())
    entry = THINK | {"id": 701, "content": "<e\u0301>", "normalized": True}
    content["model"]["vocab"] |= {EOD: 700, entry["content"]: 701}
    content["added_tokens"] = [{"id": 700, **EOD_ENTRY}, entry]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(tmp_path)
    fast = FastEncoder(tokenizer)
    same(fast, ReferenceEncoder(tokenizer), ["a<\u00e9>b", "a<e\u0301>b", "a<e>b"])
    assert 701 in fast.encode(["a<\u00e9>b"]).ids


def test_a_tokenizer_file_need_not_list_added_tokens(tmp_path: Path) -> None:
    content = json.loads((telling_tokenizer(tmp_path) / "tokenizer.json").read_text())
    content["model"]["vocab"][EOD] = 700
    del content["added_tokens"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(tmp_path)
    fast, reason = choose(tokenizer)
    assert isinstance(fast, FastEncoder) and reason is None
    same(fast, ReferenceEncoder(tokenizer), [f"a{EOD}b", ""])


@given(mixed, mixed)
@settings(max_examples=30)
def test_a_special_token_in_a_text_is_its_characters(
    pair: tuple[FastEncoder, ReferenceEncoder], tokenizer: Tokenizer, before: str, after: str
) -> None:
    ids = pair[0].encode([f"{before}{EOD}{after}"]).ids
    assert tokenizer.eod_id not in ids
    assert EOD in tokenizer.decode(ids)


def test_nothing_to_encode_is_no_ids(pair: tuple[FastEncoder, ReferenceEncoder]) -> None:
    for encoder in pair:
        assert encoder.encode([]).ids.shape == encoder.encode([]).lengths.shape == (0,)
        assert encoder.encode(["", ""]).lengths.tolist() == [0, 0]


def test_a_full_cache_is_emptied_and_ids_stay_the_same(
    tokenizer: Tokenizer, pair: tuple[FastEncoder, ReferenceEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = FastEncoder(tokenizer)
    first = fast._backend
    monkeypatch.setattr(fast_bpe, "CACHE_BYTES", -1 << 40)
    same(fast, pair[1], ["some text", "\u00e9"])
    assert fast._backend is not first


MODEL = {"type": "BPE", "vocab": {}, "merges": []}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "type Unigram"),
        ({"model": MODEL | {"byte_fallback": True}}, "byte_fallback"),
        ({"model": MODEL | {"dropout": 0.1}}, "dropout"),
        ({"model": MODEL | {"unk_token": "<unk>"}}, "unk_token"),
        ({"model": MODEL | {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"model": MODEL | {"merges": ["a b", "a b"]}}, "listed twice"),
        ({"model": MODEL | {"vocab": {"\u2581the": 0}}}, "byte alphabet"),
        ({"model": MODEL}, "no token for the byte"),
        ({"normalizer": {"type": "NFKC"}}, "normalizer NFKC"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Strip"}]}}, "normalizer Strip"),
        ({"pre_tokenizer": None}, "no pre_tokenizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "does not end in ByteLevel"),
        ({"pre_tokenizer": GPT2 | {"add_prefix_space": True}}, "prefix space"),
        ({"pre_tokenizer": NO_SPLIT}, "never"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, NO_SPLIT]}}, "Digits"),
    ],
)  # fmt: skip
def test_what_gigatoken_would_pass_over_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    content = (telling_tokenizer(tmp_path, **changes) / "tokenizer.json").read_bytes()
    assert reason in (why_not(content) or "")


@pytest.mark.parametrize("change", [{"behavior": "Removed"}, {"invert": True}, {"pattern": {"String": " "}}])
def test_a_split_is_by_a_regular_expression_and_isolated(tmp_path: Path, change: dict[str, Any]) -> None:
    content = json.loads((telling_tokenizer(tmp_path) / "tokenizer.json").read_text())
    assert why_not(json.dumps(content).encode()) is None
    content["pre_tokenizer"]["pretokenizers"][0] |= change
    assert why_not(json.dumps(content).encode()) is not None


def test_an_unknown_expression_falls_back_and_says_so(tmp_path: Path) -> None:
    tokenizer = load_telling(tmp_path, split=r"\w+|\W")
    encoder, reason = choose(tokenizer)
    assert isinstance(encoder, ReferenceEncoder)
    assert reason is not None and "tokenizers" in reason and "\n" not in reason
    with pytest.raises(ConfigError, match="gigatoken"):
        choose(tokenizer, "gigatoken")


def test_a_backend_can_be_chosen_by_name(tokenizer: Tokenizer) -> None:
    assert isinstance(choose(tokenizer, "tokenizers")[0], ReferenceEncoder)
    assert isinstance(choose(tokenizer, "gigatoken")[0], FastEncoder)
    encoder, reason = choose(tokenizer)
    assert encoder.name.startswith("gigatoken ") and reason is None


class Wrong:
    """Gives the reference's ids, but for one."""

    name = "wrong 1.0"

    def __init__(self, tokenizer: Tokenizer, token: int, instead: int | None) -> None:
        self._reference, self._token, self._instead = ReferenceEncoder(tokenizer), token, instead

    def encode(self, texts: list[str]) -> Encoded:
        ids, lengths = self._reference.encode(texts)
        if self._instead is None:
            lengths[-1] -= 1
            return Encoded(ids[:-1], lengths)
        return Encoded(np.where(ids == self._token, self._instead, ids).astype(np.uint32), lengths)


def test_a_difference_is_located(tokenizer: Tokenizer) -> None:
    texts = ["abba", "xyz", "a z"]
    z, seven = ord("z"), 7
    assert first_difference(ReferenceEncoder(tokenizer), tokenizer, texts + nasty_texts(tokenizer)) is None
    assert first_difference(Wrong(tokenizer, z, seven), tokenizer, texts) == (1, 2, seven, z)
    assert first_difference(Wrong(tokenizer, z, None), tokenizer, texts) == (2, 2, None, z)


def test_an_id_outside_the_vocabulary_is_an_error(tokenizer: Tokenizer) -> None:
    smaller = Tokenizer(ord("z"), tokenizer.eod_id, tokenizer.sha256, tokenizer._backend, tokenizer.content)
    with pytest.raises(DataError, match="the vocabulary does not have"):
        FastEncoder(smaller).encode(["abcz"])
