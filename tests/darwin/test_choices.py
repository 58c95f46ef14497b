"""Turns composed of choices: nothing but the passage's sentences and words, in the prompt's forms."""

from __future__ import annotations

import json
import re

import pytest

from megatron_davinci.darwin.choices import Choice, composed, numbered, offer, terms_of
from megatron_davinci.darwin.dialogue_gates import Turn, turn_violations
from megatron_davinci.darwin.lineage import events, find
from megatron_davinci.darwin.prompts import load_prompt
from megatron_davinci.errors import ConfigError
from tests.darwin.making import made
from tests.darwin.test_converse import SPEAKERS, TEXT, conversing

ASKS = Choice(forms=["What is meant by {{words}}?", "Why is it that {{sentence}}"], words=3)
ANSWERS = Choice(forms=["{{sentence}}"], answers=True, sentences=2)
COPPER, NOVAK, RESULT = list(numbered(TEXT).values())[:3]


def test_sentences_of_a_passage_that_may_be_spoken_of():
    assert COPPER == "Copper melts at 1085 °C." and len(numbered(TEXT)) == 4
    text = "of the old furnace door was lost.\n\nFurnace heat\n\nHeat (through the open\ndoor was lost.\n\n"
    text += "No. The furnace of Novak lost heat."
    assert list(numbered(text).values()) == ["The furnace of Novak lost heat."]


def test_words_that_may_be_copied_stand_behind_one_another():
    terms = terms_of("Heat was lost through its door, and $Q = mc$ gave less.", 4)
    assert {"Heat", "Heat was lost", "lost through its door", "gave less"} <= set(terms)
    assert not {"was", "its door", "door and", "door, and", "lost through", "through"} & set(terms)


def test_what_was_said_is_not_offered_again_and_answers_speak_of_the_question():
    begun = offer(ASKS, TEXT, [])
    assert list(begun.sentences) == [1, 2, 3, 4] and "[1] Copper melts" in begun.passage
    assert begun.forms.split("\n")[0] == 'say(1, N, "WORDS")    What is meant by WORDS?'
    asked = [Turn("Student", "What is meant by own design?")]
    assert list(offer(ANSWERS, TEXT, asked, ASKS.stems).sentences) == [2]
    assert not offer(ANSWERS, TEXT, [Turn("Student", "What is meant by tea?")], ASKS.stems).form
    said = [*asked, Turn("Teacher", NOVAK)]
    after = offer(ASKS, TEXT, said)
    assert list(after.sentences) == [1, 3, 4] and f"\n{NOVAK}\n" in after.passage
    assert offer(ANSWERS, TEXT, [*said, Turn("Student", f"{COPPER} {RESULT}")]).sentences.keys() <= {4}


@pytest.mark.parametrize(
    "program,calls,said",
    [
        ('say(1, 1, "copper melts")', ['say(1, 1, "Copper melts")'], "What is meant by Copper melts?"),
        ("say(2, 3)", ["say(2, 3)"], f"Why is it that {RESULT}"),
        ('say(1, 1, "copper freezes")', [], ""), ('say(1, 1, "at")', [], ""), ('say(1, 1, "")', [], ""),
        ('say(1, 2, "measured it in 1902 with")', [], ""), ("say(1, 1)", [], ""), ('say(2, 1, "Copper")', [], ""),
        ("say(3, 1)", [], ""), ("say(2, 9)", [], ""), ("say(2, 0)", [], ""), ("say(True, 1)", [], ""), ("", [], ""),
        ("say(2, 1)\nsay(2, 3)", [], ""), ("import os", [], ""),
        ('say(1, 2, "furnace of her")', ['say(1, 2, "furnace of her")'], "What is meant by furnace of her?"),
    ],
)  # fmt: skip
def test_only_what_is_offered_can_be_chosen(program, calls, said):
    assert offer(ASKS, TEXT, []).chosen(program) == calls
    assert composed(ASKS, TEXT, calls) == said
    if said:
        assert turn_violations(said, TEXT, [], SPEAKERS) == []


def test_the_form_of_an_answer_has_every_choice_that_can_be_carried_out():
    begun = offer(ASKS, TEXT, [])
    for program in ("say(2, 4)", 'say(1, 2, "Novak measured")', 'say(1, 3, "furnace lost heat")'):
        assert re.fullmatch(begun.form, program) and begun.chosen(program)
    for program in ('say(1, 2, "copper")', "say(2, 5)", "say(1, 1)", "say(2, 1)\nsay(2, 3)", ""):
        assert not re.fullmatch(begun.form, program) and not begun.chosen(program)
    assert re.fullmatch(offer(ANSWERS, TEXT, []).form, "say(1, 3)\nsay(1, 1)")
    many = " ".join(f"{chr(97 + n % 26) * 5}ed metals {chr(97 + n % 26) * 6} were melted." for n in range(99))
    assert re.fullmatch(offer(ASKS, many.title(), []).form, 'say(1, 7, "any words at all")')


@pytest.mark.parametrize(
    "given,said",
    [
        ("choice: {forms: ['Why is that so?']}", r"choice\.forms.*line 5.*should have \{\{sentence\}\} or"),
        ("choice: {forms: ['{{words}} and {{words}}?']}", "or each of them once"),
        ("choice: {forms: ['{{text}}?']}", "or each of them once"),
        ("choice: {forms: ['As for {{words}}, yes']}", "ends with"),
        ("choice: {forms: ['In 2024 {{words}} was new.']}", "no passage backs.*ungrounded_number"),
        ("choice: {forms: ['What does the text say of {{words}}?']}", "speaks_of_the_task"),
        ("choice: {forms: []}", "forms"), ("choice: {forms: ['{{words}}?'], words: 0}", "words"),
        ("", "has none: add choice.forms"),
    ],
)  # fmt: skip
def test_a_choice_that_cannot_be_used_is_an_error(tmp_path, given, said):
    file = tmp_path / "mine.yaml"
    user = "user: '{{mark}} {{passage}} {{dialogue}} {{speaker}}'"
    file.write_text(f"name: mine\nversion: 1\ntask: choose\n{user}\n{given}\n")
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        load_prompt("mine.yaml", tmp_path, frozenset({"choose"}))
    file.write_text("name: mine\nversion: 1\ntask: agent\nuser: hi\nchoice: {forms: ['{{words}}?']}\n")
    with pytest.raises(ConfigError, match="has one; found agent"):
        load_prompt("mine.yaml", tmp_path, frozenset({"agent"}))


def chooses(content):
    """Asks about the furnace and the result, answers with what it is offered first; judges well."""
    if "Answer with one word" in content:
        return "YES"
    [mark] = set(re.findall(r"</(passage\d*)>\n\nYou,", content))
    if "You, Student," in content:
        call = (
            'say(2, 3, "her result")'
            if "her own design." in content.split("So far:")[1]
            else 'say(2, 2, "FURNACE")'
        )
    else:
        call = "say(1, {})".format(*re.findall(r"(?m)^\[(\d+)\]", content))
    return f"(thinking) <{mark}>\n```\n{call}\n```\n</{mark}>"


def test_a_dialogue_is_composed_and_says_of_what(tmp_path, server):
    server.model = chooses
    given = {"agents": ["choose_question", "choose_quotation"], "as_source": "talks"}
    corpus = made(conversing(tmp_path, server, **given))
    dialogue = max(corpus.records(), key=lambda record: len(record["id"]))
    assert [turn["text"] for turn in dialogue["turns"]] == [
        "What is meant by furnace?", NOVAK, "What is meant by Her result?", RESULT,
    ]  # fmt: skip
    entry = dialogue["darwin"]["operations"][-1]
    calls = [['say(2, 2, "furnace")'], ["say(1, 2)"], ['say(2, 3, "Her result")'], ["say(1, 3)"]]
    assert entry["notes"]["composed_of"] == calls and entry["level"] == 8
    described = corpus.manifest["operations"][-1]["settings"]["agents"]
    for turn, (number, chosen) in zip(dialogue["turns"], enumerate(calls), strict=True):
        assert composed(Choice(**described[number % 2]["choice"]), TEXT, chosen) == turn["text"]
    told = list(events(find([corpus], dialogue["id"])))
    assert told[-1].after == dialogue["text"] and not told[-1].trouble


def test_an_agent_that_writes_talks_with_one_that_chooses(tmp_path, server):
    def model(content):
        asked = "You, Student," in content and "Answer with one word" not in content
        return "<turn>Why was her result not accepted?</turn>" if asked else chooses(content)

    server.model = model
    given = {"agents": ["dialogue_student", "choose_quotation"], "least_turns": 2, "turns": 2}
    corpus = made(conversing(tmp_path, server, **given))
    dialogue = max(corpus.records(), key=lambda record: len(record["id"]))
    assert dialogue["turns"][1]["text"] == RESULT
    assert dialogue["darwin"]["operations"][-1]["notes"]["composed_of"] == [None, ["say(1, 3)"]]
    server.model = lambda content: chooses(content).replace("say(1", "say(9")
    corpus = made(conversing(tmp_path, server, "none", **given, tries=1))
    counts = json.loads((corpus.folder / "statistics.json").read_text())["counts"]
    assert counts["converse/dialogues/too_few_turns"] == counts["converse/unused answers/no_tags"] == 1
