"""Made-up texts and what is asked of them: the texts by their own rules, the measures by hand."""

from __future__ import annotations

import json
import math
import re
from collections import Counter

import numpy as np
import pytest

from megatron_davinci.cli.main import main
from megatron_davinci.data.knowledge import biographies, facts, names
from megatron_davinci.data.knowledge.corpus import Knowledge, read, write
from megatron_davinci.evaluate.knowledge import capacity, probe
from megatron_davinci.stats.memory import memory, retainability


def test_a_person_is_worth_the_bits_of_the_lists_and_every_exposure_says_all_of_it():
    lists = (names.FIRST, names.MIDDLE, names.LAST, names.BIRTH, names.CITY, names.UNIVERSITY, names.MAJOR)
    assert all(len({*one}) == len(one) for one in (*lists, names.EMPLOYER))
    assert pytest.approx(math.log2(400 * 400 * 1000)) == biographies.NAME_BITS
    assert pytest.approx(math.log2(12 * 28 * 200 * 200 * 200 * 100 * 260)) == biographies.ATTRIBUTE_BITS
    persons = biographies.people(50, 3)
    assert len({one.name for one in persons}) == 50 and persons == biographies.people(50, 3)
    told = list(biographies.exposures(persons, 4, 3))
    assert len({*told}) == 200, "no two in the same words"
    for person in persons:
        mine = [text for text in told if text.startswith(person.name)]
        assert len(mine) == 4
        assert all(value in text for text in mine for value in person.values.values())
    text, begins = biographies.biography(persons[0], np.random.default_rng(0))
    for name, begin in begins.items():
        assert text[begin:].startswith(persons[0].values[name])
    by_employer = {one.values["employer"]: one.values["workplace"] for one in biographies.people(2000, 1)}
    assert all(
        one.values["workplace"] == by_employer[one.values["employer"]] for one in biographies.people(500, 1)
    )


def test_facts_are_told_as_their_condition_says_and_probes_end_with_what_is_asked():
    made = facts.facts(40, 7)
    told = list(facts.injections(made, 7))
    for fact in made:
        mine = [text for text in told if fact.values["town"] in text]
        times = {"once": 1, "never": 0}.get(fact.condition, facts.REPEATS)
        assert len(mine) == times
        assert len({*mine}) == {"duplicate": 1, "paraphrase": facts.REPEATS}.get(fact.condition, times) or (
            fact.condition == "paraphrase" and len({*mine}) >= facts.REPEATS - 1
        )
    asked = facts.probes(made)
    assert Counter(one.kind for one in asked) == {"memorisation": 160, "semantic": 160, "composition": 80}
    original = {fact.number: facts.passage(fact, None) for fact in made}
    for one in asked:
        whole = one.before + one.answer
        assert (whole + "." in original[one.fact]) == (one.kind == "memorisation")
        # What is asked in other words, or follows, is told in no passage.
        assert one.kind == "memorisation" or not any(whole in text for text in told)
        assert not re.search(r"\w $", one.before) and one.answer[0] == " "


def test_texts_of_an_earlier_call_are_not_left_beside_what_says_what_was_made(tmp_path):
    assert write(Knowledge(people=2, exposures=1, facts=0, seed=1), tmp_path) == {"biographies.jsonl": 2}
    assert [*write(Knowledge(people=0, exposures=1, facts=4, seed=1), tmp_path)] == ["facts.jsonl"]
    assert {path.name for path in tmp_path.iterdir()} == {"facts.jsonl", "knowledge.json"}


def test_the_capacity_by_hand():
    names_, values = np.array([3.0, 5.0]), np.array([[1.0, 2, 3, 0, 0, 1], [2.0, 2, 0, 0, 4, 1]])
    found = capacity(names_, values, people=1000, parameters=50_000)
    p1, p2 = 4.0, (7 + 9) / 2
    n0, s0 = 400 * 400 * 1000, 12 * 28 * 200 * 200 * 200 * 100 * 260
    bits = math.log2(n0 / math.exp(p1)) + math.log2(s0 / math.exp(p2))
    assert found["bits_per_person"][0] == pytest.approx(bits, rel=1e-12)
    assert found["bits_per_parameter"][0] == pytest.approx(1000 * bits / 50_000, rel=1e-12)
    assert found["name_loss"][0] == p1 and found["attribute_loss"][0] == p2
    error = np.std([10 / math.log(2), 14 / math.log(2)], ddof=1) / math.sqrt(2)
    assert found["bits_per_person"][1] == pytest.approx(error)
    # A model that is no better than chance has learnt nothing, and not less.
    nothing = capacity([99.0, 99.0], np.full((2, 6), 99.0), 1000, 50_000)
    assert nothing["bits_per_parameter"] == (0.0, 0.0)


def test_a_reader_that_knows_all_has_all_bits_and_one_that_knows_what_it_was_told_shows_which():
    knowledge = Knowledge(people=5, exposures=1, facts=8, seed=2)
    (all_known, *_) = probe(knowledge, lambda texts: [(0.0, True)] * len(texts), 1000)
    whole = biographies.NAME_BITS + biographies.ATTRIBUTE_BITS
    assert all_known.metrics["bits_per_parameter,none"] == pytest.approx(5 * whole / 1000)
    told = " ".join(facts.injections(knowledge.made_up(), 2))

    def remembers(texts):
        return [(-0.5, True) if before + after in told else (-9.0, False) for before, after in texts]

    by_task = {one.task: one for one in probe(knowledge, remembers, 1000)}
    recalled = {name: one.metrics.get("recalled,none") for name, one in by_task.items()}
    assert recalled["facts_once_memorisation"] == recalled["facts_duplicate_memorisation"] == 1.0
    assert recalled["facts_never_memorisation"] == recalled["facts_once_composition"] == 0.0
    assert by_task["facts_once_semantic"].metrics["log_probability,none"] == -9.0
    bad = probe(knowledge, lambda texts: [(math.nan, False)] * len(texts), 1000)
    assert all(one.problem and not one.metrics for one in bad)


def test_retainability_by_hand():
    # Shares of the rise that are left: 0.5, 0.5, 0.5, 0.6 and, far out, 40; one did not rise.
    before, peak = [-4.0, -4, -4, -4, -4, -1], [-2.0, -2, -2, -2, -3.9, -1]
    now = [-3.0, -3, -3, -2.8, 0.0, -1]
    assert retainability(before, peak, now) == pytest.approx((0.5 + 0.5 + 0.5 + 0.6) / 4)
    assert math.isnan(retainability([-1.0], [-1.0], [-1.0]))


def test_a_memory_that_fades_with_the_logarithm_of_tokens_is_fitted_exactly():
    tokens = np.array([100.0, 200, 210, 300, 1200])
    # Learnt at 200; of a rise by 2 nats, 1 - 0.25 log10(tokens since) is left.
    left = [0.0, 1.0, *(1 - 0.25 * np.log10(tokens[2:] - 200))]
    found = memory(tokens, np.array([[-5 + 2 * share, -3 + 2 * share] for share in left]))
    assert found.effectivity == pytest.approx(2.0) and found.peak_tokens == 200
    assert found.decay == pytest.approx(0.25)
    assert found.threshold == pytest.approx(1e4)
    assert found.retained == pytest.approx(0.25)
    rising = memory([1.0, 2, 3], [[-3.0], [-2.0], [-1.0]])
    assert math.isnan(rising.retained) and math.isnan(rising.decay)


def test_the_command_makes_texts_that_say_how_they_were_made(tmp_path, capsys):
    out = tmp_path / "made"
    words = ["--people", "20", "--exposures", "3", "--facts", "8", "--seed", "5", "--out", str(out)]
    assert main(["data", "knowledge", *words]) == 0
    assert "73.24 bits" in capsys.readouterr().out
    lines = (out / "biographies.jsonl").read_text().splitlines()
    assert len(lines) == 60 and json.loads(lines[0])["text"].endswith(".")
    assert len((out / "facts.jsonl").read_text().splitlines()) == 2 + 20 + 20
    assert read(out) == Knowledge(20, 3, 8, 5)
    assert main(["data", "knowledge", "--facts", "7", "--out", str(out)]) == 2
    assert "do not divide evenly" in capsys.readouterr().err
    (out / "knowledge.json").write_text(json.dumps({"people": "many"}))
    assert main(["eval", str(tmp_path), "--suite", "knowledge", "--knowledge", str(out)]) == 2
    assert "does not say what was made" in capsys.readouterr().err
    assert main(["eval", str(tmp_path), "--suite", "knowledge"]) == 2
    assert "--knowledge DIR" in capsys.readouterr().err
