"""`davinci curriculum`: what a person reads of a run's mixture, and how an edit is asked for and refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from megatron_davinci.cli import curriculum_screen
from megatron_davinci.cli.curriculum_screen import _chart
from megatron_davinci.cli.screen import Screen
from megatron_davinci.data import Journal, MixRecord
from megatron_davinci.data.apportion import exact_weight
from tests.cli.screen import davinci
from tests.tiny import tiny_config, tiny_settings
from tests.train.recorded import record_run

# Batches of 4 until step 12, then of 8; the first stage ends with step 30 (sample 192), the run with step 50.
WHY = ("--reason", "b still falls")


@pytest.fixture
def run(tmp_path):
    """A run of which 20 steps are on record."""
    return record_run(tiny_config(tmp_path), 20).path


def edit(run, *words):
    return davinci("curriculum", "edit", run, *words)


def shown(run):
    screen = davinci("curriculum", "show", run, "--json")
    assert screen.code == 0, screen.err
    return json.loads(screen.out)


def test_an_edit_waits_for_its_point_and_is_shown(run):
    screen = edit(run, "--at", "50%", "--mixture", "a=0.5,b=0.5", *WHY)
    assert screen.code == 0 and "step 29 of stage first on: sample 176" in screen.out
    assert "until   step 31, stage second" in screen.out
    found = shown(run)
    assert [(r["step"], r["origin"], r["in_journal"]) for r in found["records"]] == [
        (1, "", True), (29, "edit-1", False), (31, "", False),
    ]  # fmt: skip
    assert found["records"][1]["weights"] == {"a": "0.5", "b": "0.5"}
    assert found["records"][1]["reason"] == "b still falls"
    assert found["now"]["samples"] == 112 and found["change_begins"]["step"] == 21
    assert [(e["name"], e["state"], e["asked"]) for e in found["edits"]] == [
        ("edit-1", "planned", "--at 50%")
    ]


@pytest.mark.parametrize(
    ("where", "step"),
    [
        (("--next",), 21),
        (("--at-step", "25"), 25),
        (("--at-tokens", "4k"), 23),
        (("--stage", "second"), 31),
        (("--at", "40.9%"), 25),
    ],
)
def test_a_point_may_be_said_in_five_ways(run, where, step):
    assert edit(run, *where, "--mixture", "b=1", *WHY).code == 0
    assert [r["step"] for r in shown(run)["records"] if r["origin"]] == [step]


def test_a_dry_run_writes_nothing_and_says_what_would_change(run):
    before = sorted(path.name for path in run.iterdir())
    screen = edit(run, "--next", "--mixture", "b=1", *WHY, "--dry-run")
    assert screen.code == 0 and "edit-1, as it would be" in screen.out and "Nothing was written" in screen.out
    assert sorted(path.name for path in run.iterdir()) == before


def test_epochs_and_what_is_left_are_those_of_the_order(run):
    found = {source["name"]: source for source in shown(run)["sources"]}
    windows = {name: source["windows"] for name, source in found.items()}
    assert found["a"]["given"] + found["b"]["given"] == 112
    assert found["a"]["planned"] + found["b"]["planned"] == 352
    for name in "ab":
        assert found[name]["epochs"] == found[name]["given"] / windows[name]
        assert (found[name]["given"] + found[name]["left_in_epoch"]) % windows[name] == 0
    # a gives three quarters of 192 samples and a fifth of 160: 176.
    assert found["a"]["planned"] == 176


def test_the_screen_fits_80_columns_and_says_all(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    Journal.open(run / "journal.jsonl").append(
        MixRecord(112, "first", {"a": "0.1", "b": "0.9"}, origin="saturation", reason="a is saturated")
    )
    edit(run, "--stage", "second", "--mixture", "a=0.5,b=0.5", *WHY)
    screen = davinci("curriculum", "show", run)
    assert screen.code == 0 and max(len(line) for line in screen.out.splitlines()) <= 80
    for said in (
        "step 20 of 50, 3.58k of 11.3k tokens (31.8%), stage first next",
        "|first",
        "^ now",
        "* step 21, 3.58k tokens, saturation in stage first",
        "a is saturated",
        "* step 31, 6.14k tokens, edit-1 in stage second (planned)",
        "a 50% (+40), b 50% (-40)",
    ):
        assert said in screen.out, screen.out
    assert "\x1b" not in screen.out


def test_an_edit_is_withdrawn_replaced_and_numbered_on(run):
    edit(run, "--stage", "second", "--mixture", "a=1", *WHY)
    edit(run, "--stage", "second", "--mixture", "b=1", *WHY)
    assert [(r["origin"]) for r in shown(run)["records"]] == ["", "edit-2"]
    assert [e["state"] for e in shown(run)["edits"]] == ["replaced", "planned"]
    assert edit(run, "--withdraw", "edit-2", "--reason", "too early").code == 0
    assert [(r["origin"]) for r in shown(run)["records"]] == ["", "edit-1"]
    assert [e["state"] for e in shown(run)["edits"]] == ["planned", "withdrawn"]
    edit(run, "--stage", "second", "--mixture", "b=1", *WHY)
    assert edit(run, "--withdraw", "edit-1", "--reason", "it must not come back").code == 0
    assert [e["state"] for e in shown(run)["edits"]] == ["withdrawn", "withdrawn", "planned"]
    assert "edit-2 is withdrawn" in edit(run, "--withdraw", "edit-2", "--reason", "again").refusal()
    assert "no such edit" in edit(run, "--withdraw", "edit-9", "--reason", "x").refusal()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--next", "--mixture", "a=0.5,b=0.4", *WHY), "the weights sum to 0.9, not to 1"),
        (("--next", "--mixture", "a=0.5,c=0.5", *WHY), "mixes c; data.sources has a, b"),
        (("--next", "--mixture", "a:0.5,b:0.5", *WHY), "NAME=SHARE"),
        (("--next", "--mixture", "a=0.5,a=0.5", *WHY), "names something twice"),
        (("--next", "--mixture", "a=x,b=1", *WHY), "the weight of a is not a number"),
        (("--next", "--mixture", "a=1"), "A change needs a reason."),
        (("--next", *WHY), "An edit needs a mixture."),
        (("--mixture", "a=1", *WHY), "one of --next, --at 30%"),
        (("--at-step", "20", "--mixture", "a=1", *WHY), "the present begins at step 21 of stage first"),
        (("--at", "10%", "--mixture", "a=1", *WHY), "rewrite the past, which is sealed"),
        (("--stage", "first", "--mixture", "a=1", *WHY), "stage first has begun"),
        (("--stage", "third", "--mixture", "a=1", *WHY), "first, second"),
        (("--at-step", "51", "--mixture", "a=1", *WHY), "1 to 50"),
        (("--at", "130%", "--mixture", "a=1", *WHY), "0% to 100%"),
        (("--at-tokens", "3 mice", "--mixture", "a=1", *WHY), "no token count"),
        (("--at-tokens", "2B", "--mixture", "a=1", *WHY), "the run is over before"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_and_nothing_written(run, words, said):
    assert said in edit(run, *words).refusal()
    assert not (run / "edits.jsonl").exists()


def test_an_edit_keeps_the_caps_on_repetition(tmp_path):
    stages = tiny_settings(tmp_path)["curriculum"]
    capped = [stages[0], {**stages[1], "max_epochs": {"b": 1}}]
    run = record_run(tiny_config(tmp_path, curriculum=capped), 20).path
    assert "repeat a source more often" in edit(run, "--next", "--mixture", "b=1", *WHY).refusal()
    assert not (run / "edits.jsonl").exists()


def test_where_there_is_no_run(tmp_path):
    assert "There is no run here." in davinci("curriculum", "show", tmp_path).refusal()


def test_a_run_at_its_end_has_nothing_to_edit(tmp_path):
    run = record_run(tiny_config(tmp_path), 50).path
    assert "no step is left" in edit(run, "--next", "--mixture", "b=1", *WHY).refusal()
    assert "at its end: 50 steps" in davinci("curriculum", "show", run).out


def test_the_plots_are_a_picture_and_a_page(run, tmp_path):
    edit(run, "--next", "--mixture", "b=1", "--reason", "<b> is best")
    for name in ("mixture.png", "mixture.html"):
        assert davinci("curriculum", "show", run, "--plot", tmp_path / name).code == 0
    assert (tmp_path / "mixture.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "mixture.html").read_text()
    assert "&lt;b&gt; is best" in page and "edit-1" in page and "planned" in page
    assert ".png or .html" in davinci("curriculum", "show", run, "--plot", tmp_path / "x.pdf").refusal()
    assert (
        "not allowed" in davinci("curriculum", "show", run, "--json", "--plot", tmp_path / "x.png").refusal()
    )
    piped = davinci("curriculum", "show", run).out.splitlines()
    assert "    <b> is best" in piped and max(map(len, piped)) < 200, "nothing is filled up with spaces"


def test_of_hundreds_of_edits_each_is_worked_out_once(monkeypatch):
    asked = []
    monkeypatch.setattr(
        curriculum_screen, "exact_weight", lambda text: asked.append(text) or exact_weight(text)
    )
    weights = {f"s{n}": "0.02" for n in range(50)}
    course = SimpleNamespace(
        records=[(MixRecord(4 * n, "one", weights), n) for n in range(200)],
        total=800,
        now=400,
        uses=lambda: [SimpleNamespace(source=name, planned=1) for name in weights],
        config=SimpleNamespace(curriculum=[]),
    )
    _chart(course, Screen())
    # And the first and the last once more for each source, which its line begins and ends with.
    assert 200 * 50 <= len(asked) <= (200 + 2 * 50) * 50
