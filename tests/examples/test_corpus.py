"""The quickstart's corpus: real text in four domains, the same each time, split without leaks."""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.errors import DataError

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))
import corpus
import questions
from documents import DOMAINS, Document, families, letters_of, select, size_of, split

LIBRARY = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module")
def small_machine() -> list[list[Document]]:
    """What a few packages of the standard library give, as tiers of documents."""
    paths = [
        path
        for name in ("email", "json", "logging", "unittest")
        for path in sorted((LIBRARY / name).glob("*.py"))
    ]
    paths += [
        LIBRARY / f"{name}.py" for name in ("statistics", "fractions", "random", "heapq", "argparse", "pdb")
    ]
    documents = [d for path in paths for d in corpus.documents_of_source(("stdlib", LIBRARY, path))]
    return [corpus.help_topics()[:30], documents]


@pytest.fixture(scope="module")
def built(small_machine: list[list[Document]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "gather", lambda: iter(small_machine))
        return out, corpus.build_corpus(out, 300_000, seed=1)


def lines(out: Path, domain: str, side: str) -> list[dict]:
    return [
        json.loads(line) for line in (out / f"{domain}.{side}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_has_both_sides_and_the_report_counts_them(
    built: tuple[Path, dict], domain: str
) -> None:
    out, report = built
    for side in ("train", "valid"):
        rows = lines(out, domain, side)
        assert report[domain][f"{side}_documents"] == len(rows) > 0
        assert report[domain][f"{side}_bytes"] == sum(len(row["text"].encode()) for row in rows)
        assert all(row["domain"] == domain and row["source"] and row["text"].strip() for row in rows)
    assert report[domain]["train_bytes"] + report[domain]["valid_bytes"] <= 300_000


def test_ids_are_unique_and_no_file_of_the_machine_is_on_both_sides(built: tuple[Path, dict]) -> None:
    out, _ = built
    rows = {side: [row for d in DOMAINS for row in lines(out, d, side)] for side in ("train", "valid")}
    ids = [row["id"] for side in rows.values() for row in side]
    assert len(set(ids)) == len(ids)
    assert not {row["source"] for row in rows["train"]} & {row["source"] for row in rows["valid"]}
    assert not {letters_of(row["text"]) for row in rows["train"]} & {
        letters_of(r["text"]) for r in rows["valid"]
    }


def test_a_question_document_is_its_prompt_and_its_response(built: tuple[Path, dict]) -> None:
    for row in lines(built[0], "qa", "train"):
        assert row["text"] == row["prompt"] + row["response"]
        assert row["prompt"].startswith("Question: ") and row["prompt"].endswith("\nAnswer:")
        assert row["response"].startswith(" ") and row["response"].endswith("\n")
    assert "prompt" not in lines(built[0], "code", "train")[0]


def test_the_same_machine_gives_the_same_bytes_and_another_seed_another_split(
    built: tuple[Path, dict],
    small_machine: list[list[Document]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(corpus, "gather", lambda: iter([list(reversed(tier)) for tier in small_machine]))
    corpus.build_corpus(tmp_path / "again", 300_000, seed=1)
    corpus.build_corpus(tmp_path / "other", 300_000, seed=2)
    names = sorted(path.name for path in built[0].iterdir())
    assert names == sorted(f"{d}.{side}.jsonl" for d in DOMAINS for side in ("train", "valid"))
    assert all((tmp_path / "again" / name).read_bytes() == (built[0] / name).read_bytes() for name in names)
    assert (tmp_path / "other" / names[0]).read_bytes() != (built[0] / names[0]).read_bytes()


def test_a_domain_without_text_is_an_error_and_writes_nothing(
    small_machine: list[list[Document]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = [[d for d in tier if d.domain != "science"] for tier in small_machine]
    monkeypatch.setattr(corpus, "gather", lambda: iter(without))
    with pytest.raises(DataError, match="no train text for the domain 'science'"):
        corpus.build_corpus(tmp_path, 300_000)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_domain_in_the_budget_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown domain") as caught:
        corpus.build_corpus(tmp_path, {"maths": 3})
    assert caught.value.found == "maths"


def document(
    number: int, *, source: str | None = None, text: str | None = None, domain: str = "general"
) -> Document:
    # Digits do not count when texts are compared, so the number is spelled in letters.
    word = "".join(chr(ord("a") + int(digit)) for digit in str(number))
    return Document(domain, source or f"source {number}", "", text or f"{word} " * 100)


def test_copies_are_dropped_whatever_their_case_spaces_digits_and_domain() -> None:
    first = document(1, text="Copyright 2019 The Authors.")
    copy = document(2, text="copyright  2024\nthe authors", domain="code")
    kept = select([[first], [copy, document(3)]], dict.fromkeys(DOMAINS, 10_000), seed=0)
    assert kept == [first, document(3)]


@given(st.integers(0, 3000), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_a_selection_keeps_to_the_budget_and_takes_earlier_tiers_first(budget: int, seed: int) -> None:
    early, late = [document(n) for n in range(10, 20)], [document(n) for n in range(20, 30)]
    kept = select([early, late], dict.fromkeys(DOMAINS, budget), seed)
    assert sum(map(size_of, kept)) <= budget
    if any(d in late for d in kept):
        assert set(early) <= set(kept)


def test_licences_that_begin_or_end_alike_are_one_family() -> None:
    body = "permission is hereby granted to any person " * 10
    ending = "the software is provided as is without warranty " * 10
    a = document(1, source="a/LICENSE", text=f"{body} {'a' * 2000} {ending}")
    same_ending = document(2, source="b/LICENSE", text=f"Copyright B. {'b' * 2000} {ending.upper()}")
    same_beginning = document(3, source="c/COPYING", text=f"{body * 4} c")
    also = document(4, source="d/COPYING", text=f"{body * 4} d 2020, and more")
    grouped = families([a, same_ending, same_beginning, also, document(5)])
    assert sorted(sorted(d.source for d in members) for members in grouped.values()) == [
        ["a/LICENSE", "b/LICENSE"],
        ["c/COPYING", "d/COPYING"],
        ["source 5"],
    ]


@given(
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from(DOMAINS)), min_size=1, max_size=200),
    st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_a_split_loses_nothing_parts_no_source_and_holds_out_little(
    shape: list[tuple[int, str]], seed: int
) -> None:
    documents = [
        document(number, source=f"source {source}", domain=domain)
        for number, (source, domain) in enumerate(shape)
    ]
    sides = split(documents, seed)
    assert sorted(d for side in sides.values() for d in side) == sorted(documents)
    train = {d.source for (_, side), members in sides.items() if side == "train" for d in members}
    valid = {d.source for (_, side), members in sides.items() if side == "valid" for d in members}
    assert not train & valid


def test_a_large_domain_holds_out_forty_documents_and_about_a_twenty_fifth() -> None:
    documents = [document(n, text=f"{document(n).text * 50}") for n in range(1000)]
    sides = split(documents, 0)
    assert len(sides["general", "valid"]) == 40
    assert sum(map(size_of, sides["general", "valid"])) >= 0.04 * sum(map(size_of, documents))


def test_one_large_file_is_never_the_validation_set() -> None:
    large = document(0, text="large " * 100_000)
    sides = [split([large, *(document(n) for n in range(1, 200))], seed) for seed in range(20)]
    assert all(large in side["general", "train"] for side in sides)


SOURCE = '''
"""Stages of a run. And more.

This paragraph tells at length, in plain words, what the stages are good for.
"""

class Stage(Base):
    """One stage of the curriculum."""

    def end(self, start, tokens=10, *rest, scale: float = 1.5, **other) -> int:
        """Computes where the stage ends.

        Args:
            start: The first token of it all.
            tokens (int): How many tokens the stage
                takes in total.

        Returns:
            The number of the last token.
        """
        if tokens < 0:
            raise ValueError("negative")
        raise errors.Late

def _hidden():
    """Says nothing to anyone at all."""

def mean(values):
    """Return the mean of the values.

    Parameters
    ----------
    values : list
        The numbers to take the mean of.

    Returns
    -------
    float
        The arithmetic mean, or so.
    """
'''


def test_questions_are_answered_from_signature_and_docstring() -> None:
    sets = list(questions.question_sets(ast.parse(SOURCE), "run.stages"))
    pairs = {pair.question: pair.answer for _, chunk in sets for pair in chunk}
    answers = " ".join(pairs.values())
    assert pairs["Which classes does `run.stages.Stage` inherit from?"] == "It inherits from `Base`."
    assert pairs["Which arguments does `end` take?"] == (
        "It takes `start`, `tokens=10`, `*rest`, `scale=1.5` and `**other`."
    )
    assert pairs["What does `end` return?"] == "The number of the last token."
    assert pairs["What does `mean` return?"] == "The arithmetic mean, or so."
    assert pairs["Which exceptions can `end` raise itself?"] == "It can raise `ValueError` and `errors.Late`."
    assert {
        "Computes where the stage ends.",
        "The first token of it all.",
        "How many tokens the stage takes in total.",
        "The numbers to take the mean of.",
    } <= set(pairs.values())
    assert "nothing to anyone" not in answers
    defaults = [(q, a) for q, a in pairs.items() if q.startswith("What is the default")]
    assert defaults in (
        [("What is the default of `tokens` in `end`?", "The default is `10`.")],
        [("What is the default of `scale` in `end`?", "The default is `1.5`.")],
    )


def test_a_manual_keeps_sentences_and_drops_code_tables_and_licences() -> None:
    source = '''
"""Title here.

This is a paragraph of plain English that a person wrote.

>>> x = [i for i in range(10) if i is not the one]
"""
# A comment over three lines explains at some length
# why the code below it is
# as it is, and not otherwise.
x = 1
# Copyright notices are not prose that anyone
# would like to read
# in a manual.
y = 2
# 0 1 2 3
# 4 5 6 7
# 8 9 a b
'''
    explanation = source[source.index("A comment") : source.index("\nx = 1")].replace("\n# ", "\n")
    assert questions.manual(ast.parse(source), "m", source) == (
        f"m\n\nThis is a paragraph of plain English that a person wrote.\n\n{explanation}\n"
    )


def test_docstrings_added_by_a_call_are_found() -> None:
    source = (
        "add_newdoc('numpy._core', 'flatiter', 'Flat iterator.')\n"
        "add_docstr(torch.abs, r'abs({input}) is {{x}}'.format(**common) + ' More.')\n"
    )
    assert list(questions.docstrings(ast.parse(source), "torch._torch_docs")) == [
        ("numpy._core.flatiter", "Flat iterator."),
        ("torch.abs", "abs() is {x} More."),
    ]


@pytest.mark.parametrize("content", [b"def broken(:", b"\xff\xfe", b"x = '\0'"])
def test_a_file_that_is_not_python_gives_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.py").write_bytes(content)
    assert corpus.documents_of_source(("stdlib", tmp_path, tmp_path / "a.py")) == []


def test_half_a_surrogate_pair_in_a_docstring_is_left_out(tmp_path: Path) -> None:
    code = "def f():\n    pass\n" * 30
    (tmp_path / "a.py").write_text(f'"""{"Some words of prose about it. " * 30}\\ud800"""\n{code}')
    found = corpus.documents_of_source(("stdlib", tmp_path, tmp_path / "a.py"))
    assert [d.domain for d in found] == ["code"]


def test_tables_are_not_code() -> None:
    assert corpus.is_code((LIBRARY / "heapq.py").read_text())
    assert not corpus.is_code("def f(): pass\n" + "    0x1234, 0x5678, 0x9abc,\n" * 100)
    assert not corpus.is_code("def f(): pass\n" + "x" * 10_000)
