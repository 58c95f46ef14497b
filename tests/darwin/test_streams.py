import gzip
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.darwin.raw import decode
from megatron_davinci.darwin.streams import Unreadable, lines, opened, whole


@given(
    st.lists(st.binary(max_size=30).filter(lambda b: b"\n" not in b and b"\r" not in b), max_size=12),
    st.integers(1, 20),
)
def test_lines_are_at_their_places_and_long_ones_are_passed_over(parts, limit):
    content = b"\n".join(parts)
    found = list(lines(io.BytesIO(content), limit))
    assert sum(line.size for line in found) == len(content)
    for line in found:
        there = content[line.first : line.first + line.size].removesuffix(b"\n")
        assert line.content == (there if len(there) <= limit else None)


@pytest.mark.parametrize(
    "compress",
    [lambda b: b, gzip.compress, lambda b: gzip.compress(b[:50]) + gzip.compress(b[50:]), "zstd", "pzstd"],
)
def test_compression_is_seen_by_itself(tmp_path, compress):
    import zstandard

    content = b"".join(b"line %d of some text\n" % i for i in range(200))
    if isinstance(compress, str):
        skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" if compress == "pzstd" else b""

        def compress(b):
            return b"".join(skipped + zstandard.compress(part) for part in (b[:1000], b[1000:]))

    path = tmp_path / "x"
    path.write_bytes(compress(content))
    with opened(path) as file:
        assert [line.content for line in lines(file, 100)] == content.splitlines()
    with opened(path) as file:
        assert whole(file, 10_000) == content
    with pytest.raises(Unreadable, match="too_large"), opened(path) as file:
        whole(file, 100)


@pytest.mark.parametrize("compress, reason", [("gzip", "broken_gzip"), ("zstd", "broken_zstd")])
def test_a_stream_that_breaks_off_is_said(tmp_path, compress, reason):
    import random

    import zstandard

    content = random.Random(0).randbytes(400_000)
    data = (
        gzip.compress(content)
        if compress == "gzip"
        else zstandard.ZstdCompressor(write_checksum=True).compress(content)
    )
    path = tmp_path / "x"
    for broken in (data[: len(data) // 2], data[:-3], data[:1000] + b"\xff" * 64 + data[1064:]):
        path.write_bytes(broken)
        with pytest.raises(Unreadable, match=reason), opened(path) as file:
            whole(file, 10_000_000)


def test_encodings():
    assert decode(b"plain") == ("plain", "utf-8")
    assert decode("é".encode()) == ("é", "utf-8")
    assert decode("\ufeffmark".encode()) == ("mark", "utf-8-sig")
    assert decode("zwei".encode("utf-16"))[0] == "zwei"
    page = '<html><head><meta charset="iso-8859-2"></head><p>Zażółć gęślą jaźń</p></html>'
    assert decode(page.encode("iso-8859-2"), markup=True) == (page, "iso-8859-2")
    with pytest.raises(Unreadable, match="binary"):
        decode(b"\x89PNG\r\n\x1a\n\0\0\0")


@pytest.mark.parametrize(
    "declared,written,text",
    [
        ("iso-8859-1", "cp1252", "“It’s” – a dash… and €5"), ("latin1", "cp1252", "café, naïve"),
        ("iso-8859-9", "cp1254", "“İstanbul”, ğ"), ("tis-620", "cp874", "“ไทย”"), ("gb2312", "gbk", "朱镕基"),
        ("Shift_JIS", "cp932", "①㈱髙橋"), ("euc-kr", "cp949", "똠방각하 펲시"), ("big5", "big5hkscs", "𨋢，香港"),
    ],
)  # fmt: skip
def test_pages_are_read_as_browsers_read_them(declared, written, text):
    """Quotes of Windows under the name of Latin-1 are most common; as control characters they would be lost."""
    page = f'<html><head><meta charset="{declared}"></head><p>{text}</p></html>'
    assert decode(page.encode(written), markup=True)[0] == page
    assert decode(text.encode(written), header=declared)[0] == text


def test_a_page_under_the_name_of_latin_1_may_have_any_bytes():
    assert decode(b"it\x92s \x81", header="iso-8859-1")[0] == "it’s \x81"
    assert decode("né".encode("latin-1") * 40, header="no\0name")[0] == "né" * 40


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "iso-2022-jp"])
def test_encodings_whose_bytes_are_also_another_encodings_are_told_apart(encoding):
    text = f'<meta charset="{encoding}">日本国'
    assert decode(text.encode(encoding), markup=True)[0] == text
    assert decode(text.encode(encoding), header=encoding)[0] == text
