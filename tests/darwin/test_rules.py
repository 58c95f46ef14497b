"""Rules against datatrove's filters of the same names on the same words, and each rule on what it is there for."""

from __future__ import annotations

import itertools

import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import (
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    fineweb_quality_filter,
    gopher_quality_filter,
    gopher_repetition_filter,
)
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.darwin.catalogue import STEPS
from megatron_davinci.darwin.provenance import begin
from megatron_davinci.darwin.words import words_of
from tests.darwin.making import MODULES, STDLIB, prose

NAMES = {
    "gopher_short_doc": "few_words", "gopher_long_doc": "many_words", "gopher_below_avg_threshold": "short_words",
    "gopher_above_avg_threshold": "long_words", "gopher_too_many_hashes": "hashes",
    "gopher_too_many_ellipsis": "ellipses", "gopher_too_many_bullets": "bullet_lines",
    "gopher_too_many_end_ellipsis": "ellipsis_lines", "gopher_below_alpha_threshold": "few_letters",
    "gopher_enough_stop_words": "no_stop_words", "dup_para_frac": "repeated_paragraphs",
    "dup_para_char_frac": "characters_in_repeated_paragraphs", "dup_line_frac": "repeated_lines",
    "dup_line_char_frac": "characters_in_repeated_lines", "line_punct_ratio": "few_end_marks",
    "short_line_ratio": "short_lines", "char_dup_ratio": "repeated_lines", "list_ratio": "list",
    **{f"top_{n}_gram": f"top_{n}_words" for n in range(2, 5)},
    **{f"duplicated_{n}_n_grams": f"repeated_{n}_words" for n in range(5, 11)},
}  # fmt: skip


def judged(name: str, text: str, **parameters):
    step = STEPS[name](STEPS[name].Parameters(**parameters))
    step.open()
    return step.apply(document(text))


def document(text: str, licence: str | None = None) -> Document:
    return begin(text, "s/1", "s", licence, {"path": "x.py", "format": "text"})


def texts() -> list[str]:
    """Real prose and code, whole and in pieces, and pieces that repeat."""
    whole = [*prose(), *((STDLIB / f"{name}.py").read_text() for name in MODULES)]
    pieces = [text[k : k + 900] for text in whole[:40] for k in (0, 5000, 20000) if len(text) > k + 200]
    repeated = [piece * 3 for piece in pieces[:8]] + ["\n".join(pieces[:2] + pieces[:1]), "a b c d e " * 60]
    lines = [
        "- item and the\n" * 60,
        "word ...\nof the thing and to ...\n" * 30,
        "# # # the of\n" * 40,
        "12 34 56 78\n" * 30,
    ]
    return [text for text in (*whole, *pieces, *repeated, *lines) if text.strip()]


@pytest.mark.parametrize(
    "name, module, reference",
    [
        ("gopher_quality", gopher_quality_filter, GopherQualityFilter),
        ("gopher_repetition", gopher_repetition_filter, GopherRepetitionFilter),
        ("fineweb_quality", fineweb_quality_filter, FineWebQualityFilter),
    ],
)
def test_decides_as_datatrove_does_on_the_same_words(monkeypatch, name, module, reference):
    split = (
        (lambda text, language: list(words_of(text)))
        if name.startswith("fine")
        else lambda text, language: text.split()
    )
    monkeypatch.setattr(module, "split_into_words", split)
    step, peer = STEPS[name](STEPS[name].Parameters()), reference()
    seen = set()
    for text in texts():
        theirs = peer.filter(Document(text=text, id="x"))
        expected = None if theirs is True else NAMES[theirs[1]]
        assert step.apply(document(text)).drop == expected, text[:200]
        seen.add(expected)
    assert None in seen and len(seen) > 3, seen


@given(st.lists(st.sampled_from("a b c ab the of\n and\n\n #".split(" ")), max_size=60).map(" ".join))
def test_repetition_decides_as_datatrove_does_on_drawn_words(text):
    # Theirs joins words without blanks, so that "a b" is "ab" to it: the reference is given words of one length.
    text = text.replace("ab", "b").replace("the", "t").replace("of", "o").replace("and", "n")
    step, peer = STEPS["gopher_repetition"](STEPS["gopher_repetition"].Parameters()), GopherRepetitionFilter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gopher_repetition_filter, "split_into_words", lambda text, language: text.split())
        if text.strip():
            theirs = peer.filter(Document(text=text, id="x"))
            assert step.apply(document(text)).drop == (None if theirs is True else NAMES[theirs[1]])


def test_length():
    assert judged("length", "x" * 199).drop == "too_few_characters"
    assert judged("length", "x" * 200).drop is None
    assert judged("length", "one two", min_characters=None, max_words=1).drop == "too_many_words"


def test_garble():
    good = prose()[30]
    assert judged("garble", good).drop is None
    assert judged("garble", "Übergrößenträger, naïve café: 東京は日本の首都です。").drop is None
    assert judged("garble", good[:200] + "\ufffd" * 10).drop == "replacement_characters"
    wrong = "Größe, Maß, Übung und Füße für Mädchen".encode().decode("latin-1")
    assert judged("garble", wrong).drop == "mis_decoded"
    assert judged("garble", "\u2588\u2593\u2592" * 50 + "ab").drop == "garbled"


def test_marks_that_combine_with_letters_are_no_garble():
    for text in ("सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता", "e\u0301te\u0301", "กิ่ง"):
        assert judged("garble", text).scores == {"garbled": 0.0}


def test_language():
    english = prose()[25]
    assert judged("language", english).drop is None
    german = "Der Hund lief schnell über die Straße, weil er die Katze des Nachbarn gesehen hatte. " * 3
    found = judged("language", german)
    assert found.drop == "other_language" and found.notes == {"language": "de"}
    assert judged("language", german, keep=["de", "en"]).drop is None
    assert judged("language", german, keep=None).scores["language_score"] > 0.8


def test_code_quality():
    module = (STDLIB / "textwrap.py").read_text()
    assert judged("code_quality", module, parse_python=True).drop is None
    assert judged("code_quality", "# Generated by protoc. DO NOT EDIT.\n" + module).drop == "generated"
    assert judged("code_quality", module + "\nx = " + "1+" * 600 + "1\n").drop == "long_line"
    data = "x = [\n" + ("12, 34, " * 10 + "\n") * 200
    assert judged("code_quality", module[:500] + "\n" + data, min_letters=0).drop == "data"
    assert judged("code_quality", module + "\ndef f(:\n", parse_python=True).drop == "does_not_parse"
    assert judged("code_quality", "x = 1\n").drop == "few_lines"


def test_c4_takes_lines_out_and_drops_what_is_no_prose():
    good = "\n".join(f"This is sentence number {i} of the page, and it ends well." for i in range(8))
    found = judged(
        "c4", good + "\nMenu\nPlease enable JavaScript to see this.\nWe use cookies to serve you better."
    )
    assert found.text == good
    assert judged("c4", "Home\nAbout\nContact").drop == "few_sentences"
    assert judged("c4", good + "\nfunction() { return 1; }.").drop == "curly_bracket"
    assert judged("c4", good + "\nThen comes lorem ipsum and no more.").drop == "lorem_ipsum"


def test_ends_of_lines_paragraphs_and_pages_are_of_one_kind_and_long_blanks_take_no_time():
    assert judged("normalise_text", "a\u2029b\u2028c\r\nd").text == "a\nb\nc\nd"
    assert judged("normalise_text", "a \n\n\x0c \x0c\nb\x0c").text == "a\n\n\nb"
    assert judged("normalise_text", "é" + " " * 200_000 + "a").text is None
    assert judged("normalise_text", "é" + "\n" * 200_000 + "a").text == "é\n\n\na"


def test_normal_text_is_left_and_normalising_again_changes_nothing():
    step = STEPS["normalise_text"](STEPS["normalise_text"].Parameters())
    odd = [
        "a\r\nb\x00\x07c  \n\n\n\n\n\nd\x0cnew page",
        "e\u0301 \ufeffx\u200by",
        "tab\tstays\n    indent stays  \n",
        "\n\nx\n",
    ]
    for text in itertools.chain(prose()[:20], odd):
        once = step.apply(document(text)).text
        once = text if once is None else once
        assert step.apply(document(once)).text is None
    assert step.apply(document(odd[0])).text == "a\nbc\n\n\nd\n\nnew page"
    assert step.apply(document(odd[0])).notes == {"control_characters": 2}
    assert step.apply(document(odd[1])).text == "é xy"
    assert step.apply(document(odd[2])).text == "tab\tstays\n    indent stays"
    for parts in ("\x0b", "\x1c", "\x1d", "\x1e", "\x1f", "\x85", "\u2028"):
        assert step.apply(document(f"one{parts}word")).text == "one\nword"


@pytest.mark.parametrize("order", [1, -1])
def test_repetition_does_not_hang_on_the_order_in_which_a_recipe_names_runs(order):
    # Runs of five words repeat, and none of six.
    text = " ".join(f"a b c d e u{n}x" for n in range(30))
    rules = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}
    repeated = dict(list(rules.items())[::order])
    assert judged("gopher_repetition", text, top={}, repeated=repeated).drop == "repeated_5_words"


@pytest.mark.parametrize(
    ("stars", "drop"),
    [(10, None), (9, "few_stars"), (float("nan"), "unknown_stars"), ("10", "unknown_stars")],
)
def test_stars(stars, drop):
    step = STEPS["stars"](STEPS["stars"].Parameters())
    starred = document("x = 1")
    starred.metadata["fields"] = {"stars": stars}
    assert step.apply(starred).drop == drop
