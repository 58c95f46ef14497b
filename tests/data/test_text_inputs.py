"""Text files: every record once wherever a file is parted, and every fault with its file and line."""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.data import jsonl, parquet, text_inputs, tokenize
from megatron_davinci.data.jsonl import Document, Fields, document_of
from megatron_davinci.data.text_inputs import find, lines_before, pieces_of, read, read_documents
from megatron_davinci.data.tokenize import Options
from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.errors import DataError, EnvironmentProblem
from tests.data.tokenizing import documents, load_telling, write_jsonl

TEXT = Fields()
QA = Fields("text", "prompt", "response")
TEXTS = [f"document {n} " + "\u6570 ab" * (n % 9) for n in range(60)]
LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_telling(tmp_path_factory.mktemp("telling"))


def table(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def files(folder: Path) -> list[Path]:
    """The same documents in every form."""
    zstd = zstandard.ZstdCompressor()
    contents = {
        "a.jsonl": LINES,
        "b.jsonl.gz": gzip.compress(LINES[:999]) + gzip.compress(LINES[999:]),
        "c.jsonl.zst": zstd.compress(LINES[:999]) + zstd.compress(b"") + zstd.compress(LINES[999:]),
        "d.named-otherwise": gzip.compress(LINES),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    half = len(TEXTS) // 2
    table(folder / "e.parquet", {"n": list(range(60)), "text": TEXTS}, row_group_size=7)
    table(folder / "f.parquet", {"text": [text.encode() for text in TEXTS]}, compression="zstd")
    table(folder / "g.parquet", {"text": pyarrow.array(TEXTS[:half] + TEXTS[half:]).dictionary_encode()})
    return [folder / name for name in contents] + sorted(folder.glob("*.parquet"))


def test_every_form_gives_the_same_documents(tmp_path: Path) -> None:
    for path in files(tmp_path):
        assert list(read_documents(path, TEXT)) == [Document(text) for text in TEXTS], path


@given(
    st.lists(st.sampled_from([b"", b"  ", b"x", b"yy" * 9, "\u6570".encode()]), max_size=30),
    st.booleans(),
    st.integers(1, 60),
)
@settings(max_examples=150)
def test_each_line_is_in_the_one_piece_that_it_begins_in_and_knows_its_number(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ended: bool, piece_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if ended and lines else b""))
    pieces = pieces_of(path, TEXT, piece_bytes)
    assert sum(piece.size for piece in pieces) == path.stat().st_size
    found = [
        (lines_before(piece) + record.number, record.content.rstrip(b"\n"))  # type: ignore[union-attr]
        for piece in pieces
        for record in read(piece, TEXT)
    ]
    assert found == [(n, line) for n, line in enumerate(lines, 1) if line.strip()]


def test_a_line_through_many_pieces_is_not_read_to_its_end_by_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counted(io.BytesIO):
        def readline(self, size: int | None = -1) -> bytes:
            line = super().readline(size)
            taken.append(len(line))
            return line

    monkeypatch.setattr(text_inputs, "_open", lambda path: Counted(path.read_bytes()))
    pieces = [text_inputs.Piece("", "jsonl", n, n + 100, 100) for n in range(0, 10_000, 100)]
    path, taken = tmp_path / "a.jsonl", list[int]()
    path.write_bytes(b"[" + b"1," * 4_998 + b"1]\n")
    found = [record for piece in pieces for record in read(piece._replace(path=str(path)), TEXT)]
    assert len(found) == 1
    assert sum(taken) <= 3 * path.stat().st_size


def test_row_groups_are_added_up_once() -> None:
    class Size(int):
        def __radd__(self, other: int) -> int:
            sums.append(other)
            return int(self) + other

    sums: list[int] = []
    sizes = [Size(n) for n in range(1000)]
    runs = list(parquet.RowGroups(tuple(sizes)).runs(1 << 62, 7))
    assert runs == [(0, 1000, 7)]
    assert len(sums) <= 3 * len(sizes)


def test_row_groups_are_parted_and_rows_know_their_number(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", {"text": TEXTS}, row_group_size=7)
    pieces = pieces_of(path, TEXT, piece_bytes=1)
    assert [(piece.first, piece.end) for piece in pieces] == [(n, n + 1) for n in range(9)]
    assert [lines_before(piece) for piece in pieces] == list(range(0, 63, 7))
    assert [r.content for piece in pieces for r in read(piece, TEXT)] == [{"text": text} for text in TEXTS]
    assert len(pieces_of(path, TEXT)) == 1


def test_patterns_name_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "[x].jsonl").write_text("")
    names = lambda *patterns: [path.name for path in find([tmp_path / pattern for pattern in patterns])]  # noqa: E731
    assert names("*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("c.txt", "**/*.jsonl") == ["c.txt", "a.jsonl", "b.jsonl", "[x].jsonl"]
    assert names("deep/[x].jsonl") == ["[x].jsonl"]
    with pytest.raises(DataError, match="names no file"):
        find([tmp_path / "*.parquet"])
    with pytest.raises(DataError, match="cannot be read") as caught:
        find([tmp_path / "deep"])
    assert caught.value.found == "not a regular file"
    with pytest.raises(DataError, match="cannot be read") as caught:
        find([tmp_path / ("long" * 100)])
    assert caught.value.found == "File name too long"


def test_links_are_followed_and_never_round_and_round(tmp_path: Path) -> None:
    for folder in ("data/a", "data/b", "data/.hidden", "disk/c"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.jsonl").write_text("")
    for link, to in (("a/up", ".."), ("b/up", ".."), ("b/self", "."), ("c", "../disk/c")):
        (tmp_path / "data" / link).symlink_to(to)
    found = [path.relative_to(tmp_path).as_posix() for path in find([tmp_path / "data/**/*.jsonl"])]
    assert found == ["data/a/x.jsonl", "data/b/x.jsonl", "data/c/x.jsonl"]


@pytest.mark.parametrize(
    "pattern",
    [
        "**",
        "**/*",
        "a/**",
        "a/**/*.x",
        "**/b/*",
        "**/b/**",
        "*/**/c/*.x",
        "**/**/*.x",
        "a*/*",
        "[ab]/**/?.x",
        "**.x",
    ],
)
def test_patterns_name_what_they_name_to_glob(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    for name in ("1.x", "a/1.x", "a/b/2.x", "a/b/c/3.x", "b/c/4.y", "b/.h/5.x", "ab/.6.x", "b/c/b/7.x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    for named in (pattern, str(tmp_path / pattern)):
        expected = {name for name in glob.glob(named, recursive=True) if Path(name).is_file()}
        assert [os.fspath(path) for path in find([named])] == sorted(expected)


FAULTS: dict[str, tuple[bytes, int, str]] = {
    "utf-8": (b'{"text": "\xff"}', 0, "not UTF-8"),
    "surrogate": (b'{"text": "\\ud83d"}', 0, "surrogate"),
    "json": (b'{"text": "a"', 0, "not JSON"),
    "bom": (b'\xef\xbb\xbf{"text": "a"}', 0, "not JSON"),
    "list": (b"[]", 0, "not a JSON object"),
    "missing": (b'{"body": "a"}', 0, "no field 'text'"),
    "null": (b'{"text": null}', 0, "not a string"),
    "number": (b'{"text": 7}', 0, "not a string"),
    "answer": (b'{"prompt": "a", "response": ""}', 0, "answer is empty"),
    "no answer": (b'{"prompt": "a", "text": "b"}', 0, "no field 'response'"),
    "long": (b'{"text": "' + b"x" * 5000 + b'"}', 0, "too long"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_bad_line_stops_or_is_kept_apart_and_nothing_else_is_lost(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(text_inputs, "LONGEST_LINE", 1000)
    monkeypatch.setattr(tokenize, "PIECE_BYTES", 400)
    monkeypatch.setattr(tokenize, "nasty_texts", lambda tokenizer: [])
    line, _, message = FAULTS[kind]
    texts = [{"text": text} for text in TEXTS[:20]]
    first = write_jsonl(tmp_path / "a.jsonl", [*texts, {"prompt": "a?", "response": "b"}])
    second = tmp_path / "b.jsonl"
    good = LINES.splitlines(keepends=True)
    second.write_bytes(b"".join(good[20:41]) + b"\n" + line + b"\n" + b"".join(good[41:]))
    options = Options(QA)

    def run(on_error: Any) -> tokenize.Tokenized:
        inputs = [first, second]
        return tokenize.tokenize(
            inputs, tokenizer, tmp_path / "out", "web", "d", options, on_error=on_error, say=lambda line: None
        )

    with pytest.raises(DataError, match=message) as caught:
        run("stop")
    assert caught.value.where == f"{second}:23"
    assert "--on-error skip" in str(caught.value.do) or caught.value.do
    # The same job goes on, now past such lines.
    made = run("skip")
    assert made.bad == 1
    expected = [[*ids.tolist(), tokenizer.eod_id] for ids in tokenizer.encode_batch(TEXTS)]
    pair = [id_ for ids in tokenizer.encode_batch(["a?", "b"]) for id_ in ids.tolist()]
    expected.insert(20, [*pair, tokenizer.eod_id])
    assert documents(tmp_path / "out", made.manifest) == expected
    (bad,) = map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    assert (bad["file"], bad["line"]) == (str(second), 23)
    assert message in bad["reason"]
    if kind == "utf-8":
        assert bad["content_base64"] == "eyJ0ZXh0IjogIv8ifQo="
    elif kind != "long":
        assert bad["content"].encode() == line


@pytest.mark.parametrize("loads", [None, jsonl._fast_loads])
@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "a", "score": NaN}',
        b'{"text": "a", "score": 1e999}',
        b'{"text": "a", "of": {"text": "\\ud800"}}',
        b'{"text": "b", "text": "a"}',
        b' {"text": "\\u0061"}\r\n',
    ],
)
def test_either_parser_takes_what_pythons_takes(
    monkeypatch: pytest.MonkeyPatch, loads: Any, line: bytes
) -> None:
    monkeypatch.setattr(jsonl, "_fast_loads", loads)
    assert document_of(line, Fields(), "").text == "a"


def test_questions_and_answers_may_stand_in_objects(tmp_path: Path) -> None:
    records = [{"of": {"q": "p", "a": "r"}, "text": "both"}, {"text": "t"}]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    assert list(read_documents(path, Fields("text", "of.q", "of.a"))) == [Document("p", "r"), Document("t")]


@pytest.mark.parametrize("kind", [kind for kind in FAULTS if kind != "long"])
def test_a_bad_line_is_bad_in_the_same_words_to_either_parser(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    said = []
    for loads in (None, jsonl._fast_loads):
        monkeypatch.setattr(jsonl, "_fast_loads", loads)
        with pytest.raises(DataError) as caught:
            document_of(FAULTS[kind][0], QA, "a.jsonl:1")
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_job_that_passed_over_lines_does_not_turn_to_stopping_at_them(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "PIECE_BYTES", 200)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + LINES)

    def stop(done: int, total: int) -> None:
        if done > 1000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize.tokenize([path], tokenizer, tmp_path / "out", "w", "d", on_error="skip", progress=stop)
    with pytest.raises(DataError, match="now is to stop at them"):
        tokenize.tokenize([path], tokenizer, tmp_path / "out", "w", "d")
    assert tokenize.tokenize([path], tokenizer, tmp_path / "out", "w", "d", on_error="skip").bad == 1


@pytest.mark.parametrize("name", ["b.jsonl.gz", "c.jsonl.zst"])
def test_a_compressed_file_that_is_cut_short_is_an_error_or_gives_what_it_has(
    tokenizer: Tokenizer, tmp_path: Path, name: str
) -> None:
    path = next(path for path in files(tmp_path) if path.name == name)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cut short or damaged") as caught:
        tokenize.tokenize([path], tokenizer, tmp_path / "out", "w", "d")
    assert str(caught.value.where).startswith(f"{path}:")
    made = tokenize.tokenize([path], tokenizer, tmp_path / "out", "w", "d", on_error="skip")
    assert (made.bad, made.cut) == (0, 1), "nobody knows how many records are missing"
    assert 0 < made.manifest.documents < len(TEXTS)
    bad = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())
    assert bad["line"] == made.manifest.documents + 1 and bad["rest_of_file"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("content", [b"", b'{"text": "a"}\n'])
def test_a_file_is_what_its_ending_says(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="not what its ending says") as caught:
        pieces_of(tmp_path / name, TEXT)
    assert caught.value.where == tmp_path / name


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_mark_before_the_first_line_is_none_of_it(tmp_path: Path, pack: Any) -> None:
    (tmp_path / "a").write_bytes(pack(b"\xef\xbb\xbf" + LINES))
    assert [document.text for document in read_documents(tmp_path / "a", TEXT)] == TEXTS


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_file_of_a_mark_alone_is_empty(tmp_path: Path, pack: Any) -> None:
    (tmp_path / "a").write_bytes(pack(b"\xef\xbb\xbf"))
    assert list(read_documents(tmp_path / "a", TEXT)) == []


def test_frames_to_be_skipped_stand_before_and_behind_text(tmp_path: Path) -> None:
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    frames = [zstandard.ZstdCompressor().compress(part) for part in (LINES[:999], LINES[999:])]
    path = tmp_path / "as-pzstd-writes.zst"
    path.write_bytes(b"".join(skipped + frame for frame in frames) + skipped)
    assert [document.text for document in read_documents(path, TEXT)] == TEXTS


def test_a_window_above_the_librarys_own_limit_is_no_damage(tmp_path: Path) -> None:
    long = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, hash_log=6, chain_log=6)
    stream = zstandard.ZstdCompressor(compression_params=long).compressobj()
    (tmp_path / "a.zst").write_bytes(stream.compress(LINES) + stream.flush())
    assert [document.text for document in read_documents(tmp_path / "a.zst", TEXT)] == TEXTS


def test_an_empty_file_beside_others_gives_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(LINES)
    made = tokenize.tokenize([tmp_path / "*.jsonl"], tokenizer, tmp_path / "out", "w", "d")
    assert made.manifest.documents == len(TEXTS)


def test_a_line_of_many_megabytes_is_one_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "abba " * 400_000
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": text}, {"text": "y"}])
    made = tokenize.tokenize([path], tokenizer, tmp_path / "out", "w", "d")
    lengths = [len(one) for one in documents(tmp_path / "out", made.manifest)]
    assert lengths == [2, len(tokenizer.encode_batch([text])[0]) + 1, 2]


class TestParquet:
    def test_a_column_that_is_not_there(self, tmp_path: Path) -> None:
        path = table(tmp_path / "a.parquet", {"body": ["a"], "n": [1]})
        with pytest.raises(DataError, match="no column 'text'") as caught:
            pieces_of(path, TEXT)
        assert caught.value.where == path
        assert "'body', 'n'" in str(caught.value.found)
        assert pieces_of(path, Fields("body"))
        assert pieces_of(table(tmp_path / "b.parquet", {"prompt": ["a"], "response": ["b"]}), QA)

    def test_a_null_and_bad_bytes_are_named_by_row(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        rows = [b"a", None, b"\xff", b"b"]
        path = table(tmp_path / "a.parquet", {"text": rows}, row_group_size=1)
        with pytest.raises(DataError, match="no field 'text'") as caught:
            tokenize.tokenize([path], tokenizer, tmp_path / "out", "w", "d")
        assert caught.value.where == f"{path}:2"
        made = tokenize.tokenize([path], tokenizer, tmp_path / "out", "w", "d", on_error="skip")
        assert (made.manifest.documents, made.bad) == (2, 2)
        bad = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
        assert [(one["line"], one["content"]) for one in bad] == [(2, "{}"), (3, '{"text": "b\'\\\\xff\'"}')]

    def test_questions_and_answers(self, tmp_path: Path) -> None:
        columns = {"text": ["t", None], "prompt": [None, "p"], "response": [None, "r"]}
        path = table(tmp_path / "a.parquet", columns)
        assert list(read_documents(path, QA)) == [Document("t"), Document("p", "r")]

    def test_a_column_of_objects_is_looked_into(self, tmp_path: Path) -> None:
        rows = [{"q": None, "a": None}, {"q": "p", "a": "r"}]
        path = table(tmp_path / "a.parquet", {"text": ["t", "u"], "of": rows, "x.y": ["v", "w"]})
        assert list(read_documents(path, Fields("text", "of.q", "of.a"))) == [
            Document("t"),
            Document("p", "r"),
        ]
        assert list(read_documents(path, Fields("x.y"))) == [Document("v"), Document("w")]

    def test_two_columns_of_one_name(self, tmp_path: Path) -> None:
        two = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
        pyarrow.parquet.write_table(two, tmp_path / "a.parquet")
        with pytest.raises(DataError, match="more than one column 'text'"):
            pieces_of(tmp_path / "a.parquet", TEXT)

    def test_a_file_that_is_cut_short(self, tmp_path: Path) -> None:
        path = table(tmp_path / "a.parquet", {"text": TEXTS})
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(DataError, match="cut short or damaged"):
            pieces_of(path, TEXT)

    def test_row_groups_behind_a_damaged_one_are_read(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        path = table(
            tmp_path / "a.parquet",
            {"text": TEXTS},
            row_group_size=20,
            use_dictionary=False,
            compression="gzip",
        )
        page = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
        raw, middle = bytearray(path.read_bytes()), page.data_page_offset + page.total_compressed_size // 2
        raw[middle : middle + 40] = bytes(40)
        path.write_bytes(raw)
        assert len(pieces_of(path, TEXT)) == 1
        made = tokenize.tokenize([path], tokenizer, tmp_path / "out", "w", "d", on_error="skip")
        assert (made.manifest.documents, made.bad, made.cut) == (40, 0, 1)
        bad = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())
        assert bad["line"] == 21 and bad["rest_of_row_group"] and "rest_of_file" not in bad

    def test_a_page_that_is_damaged(self, tmp_path: Path) -> None:
        path = table(tmp_path / "a.parquet", {"text": TEXTS * 50}, use_dictionary=False, compression="gzip")
        raw = bytearray(path.read_bytes())
        raw[200:260] = bytes(60)
        path.write_bytes(raw)
        with pytest.raises(DataError, match="damaged"):
            list(read_documents(path, TEXT))


@pytest.mark.parametrize(("name", "package"), [("c.jsonl.zst", "zstandard"), ("e.parquet", "pyarrow")])
def test_a_library_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    path = next(path for path in files(tmp_path) if path.name == name)
    parquet._file.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(EnvironmentProblem, match=package):
        pieces_of(path, TEXT)
