"""Forms of answers: what can be read has them, and nothing that names what is not there."""

from __future__ import annotations

import re

import pytest

from megatron_davinci.darwin import forms
from megatron_davinci.darwin.edits import calls_of, carried_out
from megatron_davinci.darwin.kinds import ALL
from megatron_davinci.darwin.pair_gates import parsed

ANYTHING = forms.literal(ALL, ALL, 200)
PAIR = "BEGIN QA\nQUESTION: a b c?\nANSWER: one\ntwo\nEVIDENCE: d e f\nEND QA"


@pytest.mark.parametrize("most", [1, 2, 9, 10, 12, 20, 99, 100, 305])
def test_numbers_up_to_a_bound(most):
    form = forms.number(most)
    assert [n for n in range(most + 200) if re.fullmatch(form, str(n))] == list(range(1, most + 1))
    assert not re.fullmatch(form, "01")


@pytest.mark.parametrize(
    "form,fits,others",
    [
        (forms.edits(3), ["keep_all()", "remove_lines(1, 3)", 'remove_lines(2, 2)\nreplace("a \\"b\\"", "")'],
         ["remove_lines(1, 4)", "remove_lines(0, 1)", "keep_all()\nkeep_all()", "drop(1)", ""]),
        (forms.quotes([2, 0, 11]), ["nothing()", "quote(1, 2)", "quote(3, 11)\nquote(1, 1)"],
         ["quote(1, 3)", "quote(2, 1)", "quote(4, 1)", "nothing()\nquote(1, 1)"]),
        (forms.quotes([2], may_decline=False), ["quote(1, 2)"], ["nothing()"]),
        (forms.quotes([]), ["nothing()"], ["quote(1, 1)"]),
        (forms.calls("f", 1, [ANYTHING] * 2, 2), ["f(1)", 'f("a b", [1, 2.5])\nf({1: None}, (True, ))'],
         ["f()", "f(1, 2, 3)", "g(1)", "f(x)", "f(1)\nf(1)\nf(1)", 'f("a\nb")']),
        (forms.calls("f", 0, [ANYTHING], 1), ["f()", "f(-3)"], ["f(1, 2)"]),
        (forms.calls("f", 0, [], 1), ["f()"], ["f(1)"]),
        (forms.calls("f", 2, [forms.literal({"integer"}, ALL, 9), forms.literal({"list", "none"}, {"text"}, 2)], 1),
         ['f(-1, ["ab", ""])', "f(0, None)", "f(7, [])"], ["f(1)", 'f("a", [])', "f(1, [2])", 'f(1, ["abc"])']),
        (forms.literal({"bytes", "decimal", "dict", "truth"}, {"truth"}, 9),
         ['b"a b"', "-0.5", '{"k": True, 1: False}'],
         ["1", '"a"', '{"k": 1}', 'b"\n"', "None"]),
        (forms.turn(20), ["<turn>Why is it so?</turn>"], ["<turn>Why is it so</turn>", "<turn>a<b?</turn>",
         "<turn>>> a?</turn>", "<turn>" + "a" * 20 + ".</turn>"]),
        (forms.within("passage2", forms.YES_OR_NO), ["<passage2>\nYES\n</passage2>"], ["<passage>YES</passage>"]),
        (forms.PAIRS, ["NO QA", PAIR], ["", "BEGIN QA", PAIR.replace("ANSWER", "SAID")]),
    ],
)  # fmt: skip
def test_what_can_be_read_has_its_form(form, fits, others):
    assert all(re.fullmatch(form, text) for text in fits)
    assert not any(re.fullmatch(form, text) for text in others)


def test_what_has_a_form_can_be_read():
    assert carried_out("a\nb\nc", 'remove_lines(2, 2)\nreplace("a", "d")') == "d\nc"
    assert len(calls_of("quote(1, 2)\nquote(3, 11)")) == 2
    [pair] = parsed(PAIR)[0]
    assert (pair.question, pair.answer, pair.evidence) == ("a b c?", "one\ntwo", "d e f")
