"""Texts in chunks: put together again they are the text, and blocks are not cut."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.darwin.chunks import cut, join
from tests.darwin.making import prose

WORDS = [
    "a",
    "word",
    "the end.",
    " ",
    "\n",
    "\n\n",
    "```\n",
    "$$",
    "x = 1",
    "    code",
    "\t",
    "Ünïcode。",
    "~~~\n",
    "\\[",
    "\\]",
]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=60).map("".join), st.integers(1, 40))
def test_chunks_are_the_text_and_none_is_too_long(text, size):
    chunks = cut(text, size)
    assert join(chunks, [None] * len(chunks)) == text
    assert join(chunks, [chunk.text for chunk in chunks if True]) == text or any(not c.text for c in chunks)
    for chunk in chunks:
        assert chunk.verbatim or len(chunk.before + chunk.text + chunk.after) <= size
        assert chunk.text == chunk.text.strip() and not (chunk.before + chunk.after).strip()


def test_real_text_is_cut_at_its_seams():
    text = max(prose(), key=len)
    chunks = cut(text, 1024)
    assert join(chunks, [None] * len(chunks)) == text and len(chunks) < 2 * len(text) / 1024 + 2
    assert all(chunk.after or chunk is chunks[-1] for chunk in chunks), "cut inside a word"


def test_blocks_are_whole_or_stay_as_they_are():
    code = "```python\n" + "x = 1\n\n" * 20 + "```"
    formula = "$$\na = b\n\n+ c\n$$"
    text = f"Before. {'Words and words. ' * 8}\n\n{formula}\n\nBetween.\n\n{code}\n\nAfter."
    chunks = cut(text, 100)
    assert [chunk.text for chunk in chunks if chunk.verbatim] == [code]
    assert any(formula in chunk.text for chunk in chunks)
    assert join(chunks, [None] * len(chunks)) == text


def test_a_chunk_that_became_empty_leaves_one_seam():
    text = "One here.\n\nPage 7\n\nTwo here."
    chunks = cut(text, 11)
    assert [chunk.text for chunk in chunks] == ["One here.", "Page 7", "Two here."]
    assert join(chunks, [None, "", None]) == "One here.\n\nTwo here."
    assert join(chunks, ["Other.", None, ""]) == "Other.\n\nPage 7\n\n"


def test_tokens_can_be_measured():
    text = "one two three four five six"
    chunks = cut(text, 2, lambda texts: [len(each.split()) for each in texts])
    assert [chunk.text for chunk in chunks] == ["one two", "three four", "five six"]
