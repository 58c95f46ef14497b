"""Near-duplicates against sets of tuples, and against planted ones; contamination against planted items."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.darwin.near import candidates
from megatron_davinci.darwin.recipe import load_recipe
from megatron_davinci.darwin.shingles import jaccard, shingles, words_for_runs
from megatron_davinci.errors import DataError
from tests.cases import is_long
from tests.darwin.making import made, prose, recipe
from tests.darwin.planting import dedup_figures, runs, similarity

texts = st.lists(st.sampled_from("a b c d e 1 2 17".split()), min_size=5, max_size=40).map(" ".join)


@given(texts, texts)
def test_similarity_is_that_of_the_sets_of_runs(one, other):
    assert len(shingles(one, 5)) == len(runs(one))
    assert jaccard(shingles(one, 5), shingles(other, 5)) == pytest.approx(similarity(one, other))


def test_digits_do_not_collapse_and_marks_and_case_do():
    assert jaccard(shingles("row 1 2 3 4 5 6", 3), shingles("row 1 2 3 4 5 7", 3)) < 1
    assert jaccard(shingles("The cat, the DOG", 2), shingles("the  cat the dog.", 2)) == 1
    assert words_for_runs("ABC 東京都 x1") == ["abc", "東", "京", "都", "x1"]
    for text in ("_so_ it ____ is", "_東_ it ____ is"):
        assert "_" not in "".join(words_for_runs(text)) and len(words_for_runs(text)) == 3
    assert jaccard(shingles("", 5), shingles("", 5)) == 0
    assert len(shingles("two words", 5)) == 1


def test_candidates_are_all_pairs_that_agree_in_a_band():
    signatures = np.array([[1, 2, 3, 4], [1, 2, 9, 9], [7, 7, 3, 4], [1, 2, 3, 4], [5, 5, 5, 5]], np.uint32)
    filled = np.array([True, True, True, True, True])
    assert candidates(signatures, filled, 2).tolist() == [[0, 1], [0, 2], [0, 3], [1, 3], [2, 3]]
    filled[0] = False
    assert candidates(signatures, filled, 2).tolist() == [[1, 3], [2, 3]]
    assert candidates(signatures[:0], filled[:0], 2).tolist() == []


def test_pages_of_one_template_that_are_nearer_to_each_other_are_candidates():
    # All agree in the first band. The fourth page and the last have one hash in common that no other has.
    signatures = np.arange(80 * 4, dtype=np.uint32).reshape(80, 4) + 10
    signatures[:, :2] = 1
    signatures[79, 3] = signatures[3, 3]
    found = candidates(signatures, np.ones(80, bool), 2)
    assert [3, 79] in found.tolist()
    # Of the template's hashes alone, each is compared with the first and the four before it.
    assert len(found) == sum(min(page, 5) for page in range(80)) + 1


@pytest.mark.parametrize("seed", range(4 if is_long() else 1))
def test_planted_near_duplicates_go_and_clean_twins_stay(tmp_path, seed):
    figures = dedup_figures(tmp_path, 80, seed)
    assert figures["dedup_planted"] > 30
    assert figures["dedup_recall"] >= 0.95 and figures["dedup_precision"] >= 0.98


def test_a_document_goes_only_for_one_that_stays(tmp_path):
    words = [f"w{i}" for i in range(200)]
    # Each is like the one before it and not like the one before that: a chain must not take all.
    chain = [" ".join(words[9 * k : 9 * k + 100]) for k in range(5)]
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [*chain, "", " "])
    )
    sources = [{"name": "a", "paths": ["x.jsonl"]}]
    corpus = made(recipe(tmp_path, sources=sources, steps=[{"minhash_dedup": {"threshold": 0.8}}]))
    assert [record["id"][-1] for record in corpus.records()] == ["0", "2", "4", "5", "6"]
    for record in corpus.records("dropped"):
        notes = record["darwin"]["operations"][-1]["notes"]
        assert notes["of"] == f"a/x.jsonl#{int(record['id'][-1]) - 1}" and notes["jaccard"] >= 0.8


# ---- contamination ---------------------------------------------------------------------------------------

SHEEP = (
    "A farmer has 17 sheep and buys 23 more at the market in the spring; how many sheep has he got after selling 5 "
    "of them to his neighbour?"
)
ITEMS = [
    {"question": SHEEP, "answer": "17 + 23 - 5 = 35"},
    {
        "question": "Which of these rivers flows through nine countries?",
        "choices": ["Danube", "Nile"],
        "answer": "no",
    },
    {"question": "Why?", "answer": "No"},
]


def contaminated(tmp_path, documents, **parameters):
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    steps = [{"decontaminate": {"files": ["items.jsonl"], **parameters}}]
    return made(recipe(tmp_path, sources=[{"name": "a", "paths": ["x.jsonl"]}], steps=steps))


@pytest.mark.parametrize("words", [13, 20])
def test_items_are_found_however_they_are_spaced_and_capitalised(tmp_path, words):
    item = f"{ITEMS[0]['question']}\n{ITEMS[0]['answer']}"
    clean = list(prose()[:25])
    spoilt = [
        f"{clean[0]}\n{item}\n{clean[1]}",
        clean[2] + " " + item.replace(" ", "  \n").upper(),
        f"“{item.replace(';', ' —').replace('?', '')}”",
        item.replace("sheep", "_sheep_").replace("17", "__17__"),
        " ".join(SHEEP.split()[2:24]),
        f"And: {ITEMS[1]['question'].lower()} Danube, Nile. NO!",
    ]
    near = [
        "A farmer has 18 sheep and buys 24 more at the market in the autumn; how many has he?",
        "Why? No.",
    ]
    corpus = contaminated(tmp_path, [*spoilt, *clean, *near], words=words)
    dropped = {int(record["id"].split("#")[1]): record for record in corpus.records("dropped")}
    assert sorted(dropped) == list(range(len(spoilt)))
    for number, record in dropped.items():
        notes = record["darwin"]["operations"][-1]["notes"]
        assert notes["item"] == f"items.jsonl#{1 if number == len(spoilt) - 1 else 0}"
        assert notes["words"] in " ".join(words_for_runs(record["text"]))


def test_a_longer_run_asks_for_more(tmp_path):
    thirteen = " ".join(SHEEP.split()[:15])
    corpus = contaminated(tmp_path, [thirteen], words=20)
    assert corpus.counts["output"] == 1


def test_items_that_could_not_be_found_are_an_error(tmp_path):
    with pytest.raises(DataError, match="none that could be found"):
        contaminated(tmp_path, ["x"], fields=["queston"])
    (tmp_path / "items.jsonl").write_text("{broken")
    with pytest.raises(DataError, match="cannot be read"):
        made(load_recipe(tmp_path / "corpus.yaml"))
