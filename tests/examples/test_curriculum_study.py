"""The curriculum study at a tiny size, and its statistics and its page on outcomes that are made up."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.data.journal import Journal
from megatron_davinci.errors import ConfigError, DavinciError
from megatron_davinci.train.policies.situation import Bounds
from megatron_davinci.train.run_directory import read_lines
from tests.ranks import run_ranks
from tests.tiny import train_each

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "curriculum_study"))
import arms
import conclude
import figures
import study_page
import texts
import worth
from study import Design, carry_out, report, runs_that_are_done
from study_runs import Run, Study, train_missing

FOLDER = Path(texts.__file__).parent
DOMAINS = texts.DOMAINS
BOUNDS = Bounds(
    dict.fromkeys(DOMAINS, Fraction(2, 100)), dict.fromkeys(DOMAINS, Fraction(6, 10)), Fraction(1, 10)
)
TINY = (
    "model.num_layers=1", "model.hidden_size=16", "model.num_attention_heads=2", "model.num_query_groups=1",
    "model.ffn_hidden_size=16", "model.vocab_size=300", "model.max_sequence_length=16", "data.sequence_length=16",
    "curriculum.0.tokens=1280", "curriculum.1.tokens=1024", "curriculum.1.learning_rate.decay_tokens=256",
    "curriculum.0.global_batch_size=4", "curriculum.1.global_batch_size=4", "train.micro_batch_size=4",
    "curriculum.0.evaluate_every_steps=2", "curriculum.1.evaluate_every_steps=4", "evaluation.sequences=2",
    "curriculum.0.learning_rate.warmup_steps=4",
)  # fmt: skip


# ---- the whole, tiny -------------------------------------------------------------------------------------


def tiny_texts(folder: Path) -> None:
    words = {
        "general": "the mixture of a run is what it draws from ",
        "code": "def f(x): return x + 1\n",
        "science": "the mean of n values has a variance of ",
        "qa": "Question: what is it? Answer: a word. ",
        "tables": "'\\x0c' #  0x000c -> FORM FEED\n",
        "digests": "a/b.py,sha256=",
    }
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for domain in DOMAINS:
        documents = [
            (
                f"file {number}",
                [" ".join(f"{words[domain]}{int(n)}" for n in generator.integers(0, 10**6, 60))],
            )
            for number in range(8)
        ]
        texts.write_split(folder, domain, documents)


def train_in_one_rank(runs: Sequence[Run]) -> None:
    run_ranks(1, train_each, [run.config().model_dump(mode="json") for run in runs])


@pytest.fixture(scope="module")
def design(tmp_path_factory: pytest.TempPathFactory) -> Design:
    out = tmp_path_factory.mktemp("study")
    study = Study(FOLDER / "config.yaml", out, TINY)
    pools = texts.prepare(out / "data", 300, lambda said: None, tiny_texts)
    return Design(study, pools, [1], grid=False)


@pytest.mark.long
def test_the_study_from_text_to_page(design: Design) -> None:
    with pytest.raises(DavinciError, match="nothing to compare yet"):
        runs_that_are_done(design)
    trained: list[str] = []

    def train(runs: Sequence[Run]) -> None:
        trained.extend(run.name for run in runs)
        train_in_one_rank(runs)

    runs = carry_out(design, train)
    assert sorted(trained) == sorted(run.name for run in runs)
    assert len(runs) == design.total() == 6
    comparison, page = report(design, runs, {}, lambda said: None)

    # Every arm drew the same number of tokens, and was measured at the same ones.
    evaluated = {
        tuple(line["consumed_tokens"] for line in read_lines(run.directory.evaluations)) for run in runs
    }
    assert len(evaluated) == 1 and max(next(iter(evaluated))) == 2304
    # The random arm changed at the controller's times, within its bounds, by records of its journal.
    by_kind = {run.arm.kind: run for run in runs}
    times = figures.change_times(by_kind["controller"])
    mixes = Journal.open(by_kind["random"].directory.journal).mixes
    assert [mix.first_sample for mix in mixes if mix.origin.startswith("edit-")] == times
    assert len(times) == len(read_lines(by_kind["controller"].directory.proposals)) == 3

    html = page.read_text(encoding="utf-8")
    assert conclude.headline(comparison).split(":")[0] in html
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", html)  # nothing is fetched
    written = json.loads((design.study.out / "summary.json").read_text())
    for name in ("controller", "random", "amounts", "even", "pools", "skewed"):
        by_seed = written["arms"][name]["goal_by_seed"]
        last = [read_lines(run.directory.evaluations)[-1] for run in runs if run.arm.name == name]
        assert by_seed == pytest.approx(
            {str(n): float(np.mean(list(line["heldout_loss"].values()))) for n, line in zip((1,), last)},
            abs=1e-6,
        )
    assert (
        written["figures"]["controller_minus_best_fixed"]
        == written["arms"]["controller"]["less_best_fixed"]["mean"]
    )


@pytest.mark.long
def test_a_study_that_is_started_again_trains_nothing_and_refuses_other_settings(design: Design) -> None:
    def train(runs: Sequence[Run]) -> None:
        raise AssertionError([run.name for run in runs])

    assert len(carry_out(design, train)) == len(runs_that_are_done(design)) == 6
    other = Study(design.study.config, design.study.out, (*TINY, "optimizer.beta2=0.9"))
    with pytest.raises(ConfigError, match="other settings"):
        train_missing([Run(other, design.controller(), 1)], train)


# ---- arms ------------------------------------------------------------------------------------------------


def within(mixture: arms.Mixture) -> bool:
    return sum(mixture.values()) == 1 and all(
        Fraction(2, 100) <= share <= Fraction(6, 10) for share in mixture.values()
    )


def test_every_fixed_mixture_sums_to_one_within_the_controllers_bounds() -> None:
    pools = {
        "general": 10**6,
        "code": 5 * 10**6,
        "science": 10**6,
        "qa": 10**6,
        "tables": 10**4,
        "digests": 10**5,
    }
    found = [*arms.fixed_arms(pools, BOUNDS), *arms.grid_arms(DOMAINS, BOUNDS)]
    assert len({arm.name for arm in found}) == len(found)
    assert all(within(arm.mixture) and (arm.second is None or within(arm.second)) for arm in found)


@given(st.integers(0, 10**6), st.integers(0, 20))
@settings(max_examples=30)
def test_random_adjustments_keep_the_bounds_and_the_times(seed: int, count: int) -> None:
    times = list(range(100, 100 + count))
    even = arms.mixture(dict.fromkeys(DOMAINS, 1.0))
    changes = arms.random_changes(times, even, BOUNDS, seed, DOMAINS)
    assert [change.sample for change in changes] == times
    before = even
    for change in changes:
        assert within(change.mixture)
        assert all(abs(change.mixture[name] - before[name]) <= Fraction(1, 10) for name in DOMAINS)
        before = change.mixture
    assert changes == arms.random_changes(times, even, BOUNDS, seed, DOMAINS)


# ---- figures and conclusions -----------------------------------------------------------------------------


@pytest.mark.parametrize(("freedom", "known"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (30, 2.0423)])
def test_quantiles_of_students_t_are_those_of_the_tables(freedom: int, known: float) -> None:
    assert figures.t_quantile(freedom) == pytest.approx(known, abs=2e-4)


def test_a_paired_difference_does_not_see_what_seeds_have_in_common() -> None:
    theirs = {1: 4.0, 2: 4.5, 3: 5.0}
    found = figures.difference({1: 3.9, 2: 4.41, 3: 4.89, 4: 1.0}, theirs)
    assert found.mean == pytest.approx(-0.1)
    assert (found.low, found.high) == pytest.approx((-0.1 - 0.02484, -0.1 + 0.02484), abs=1e-4)
    assert found.verdict == "better"
    assert figures.difference({1: 4.1, 2: 4.4}, theirs).verdict == "no difference beyond noise"
    assert figures.difference({1: 4.1}, theirs).verdict == "unknown"


def made_up(study: Study, name: str, kind: arms.Kind, seed: int, goal: float) -> figures.Outcome:
    """A run that ends with this goal."""
    even = dict.fromkeys(DOMAINS, Fraction(1, 6))
    ends = np.linspace(goal - 0.5, goal + 0.5, len(DOMAINS))
    changes = kind in ("controller", "random")
    return figures.Outcome(
        run=Run(study, arms.Arm(name, kind, f"what {name} is", even), seed),
        tokens=np.array([1e5, 8e5, 1.5e6]),
        losses={domain: np.array([6.0, 5.0, end]) for domain, end in zip(DOMAINS, ends)},
        bits=dict.fromkeys(DOMAINS, goal / 2),
        edges=np.array([0, 5e5, 1.5e6] if changes else [0, 1.5e6]),
        shares={domain: np.full(2 if changes else 1, 1 / 6) for domain in DOMAINS},
        given=dict.fromkeys(DOMAINS, 250_000),
        origins=["", "controller"] if kind == "controller" else ["", "edit-1"] if changes else [""],
        decisions=[],
    )


@pytest.mark.parametrize(
    ("controller", "said"),
    [
        (3.9, "beats the best fixed mixture (pools)"),
        (4.0, "do not differ beyond noise"),
        (4.1, "it is worse"),
    ],
)
def test_the_conclusion_is_what_the_figures_say(tmp_path: Path, controller: float, said: str) -> None:
    study = Study(FOLDER / "config.yaml", tmp_path)
    levels: dict[tuple[str, arms.Kind], float] = {
        ("controller", "controller"): controller,
        ("random", "random"): 4.2,
        ("amounts", "amounts"): 4.0,
        ("even", "fixed"): 4.3,
        ("pools", "fixed"): 4.0,
        ("skewed", "fixed"): 4.5,
        ("combined", "grid"): 3.8,
    }
    noise = {1: -0.01, 2: 0.0, 3: 0.01}
    outcomes = [
        made_up(study, name, kind, seed, level + common + (0.002 * seed if name == "controller" else 0))
        for (name, kind), level in levels.items()
        for seed, common in noise.items()
    ]
    outcomes.append(made_up(study, "more qa", "grid", 1, 3.0))  # one seed alone is no oracle
    comparison = conclude.compare(outcomes)
    assert (comparison.best_fixed, comparison.oracle) == ("pools", "combined")
    assert said in conclude.headline(comparison)
    assert conclude.figures(comparison)["oracle_gain"] == pytest.approx(0.2)
    assert conclude.first_change(comparison) == pytest.approx(1 / 3)
    if controller > 3.9:  # one page is drawn
        return
    page = study_page.write_page(comparison, tmp_path, "made up", "3 runs are missing")
    html = page.read_text(encoding="utf-8")
    assert said in html and "3 runs are missing" in html and "bits per byte" in html
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_share_is_worth_is_told_from_what_time_brings(tmp_path: Path) -> None:
    study = Study(FOLDER / "config.yaml", tmp_path)
    of_share = dict(zip(DOMAINS, (0.0, 0.2, 0.3, 0.8, 0.7, -0.1)))
    tokens = np.linspace(1e5, 1.5e6, 15)
    outcomes = []
    for seed in (1, 2):
        for name, first in (("even", 1 / 6), ("much", 0.4), ("little", 0.05)):
            given = dict(zip(DOMAINS, (first, *[(1 - first) / 5] * 5)))
            losses = {
                d: 6 + seed - 0.5 * np.log(tokens) - worth_of * np.log(given[d])
                for d, worth_of in of_share.items()
            }
            one = made_up(study, name, "fixed", seed, 4.0)
            amounts = {d: round(share * 1.5e6) for d, share in given.items()}
            outcomes.append(replace(one, tokens=tokens, losses=losses, given=amounts))
    moved = made_up(
        study, "controller", "controller", 1, 3.0
    )  # its mixture does not stay: it tells nothing here
    shares = {d: np.array([1 / 6, 1 / 6 + (0.1 if d == DOMAINS[0] else -0.02)]) for d in DOMAINS}
    found = figures.by_arm([*outcomes, replace(moved, shares=shares)])
    assert worth.by_share(found) == pytest.approx(of_share, abs=1e-4)
    assert worth.by_time(found) == pytest.approx(dict.fromkeys(DOMAINS, 0.5), rel=0.02)
    said = worth.in_words(found)
    assert said is not None and "general 0.00 (0.50)" in said and "−0.10 (0.50)" in said


# ---- texts -----------------------------------------------------------------------------------------------


def test_the_easy_and_the_hopeless_domain_are_there_and_split_by_file(tmp_path: Path) -> None:
    for domain, documents in (("tables", texts.character_maps()), ("digests", texts.package_records())):
        texts.write_split(tmp_path, domain, documents)
        sides = {
            side: [
                json.loads(line) for line in (tmp_path / f"{domain}.{side}.jsonl").read_text().splitlines()
            ]
            for side in texts.SIDES
        }
        names = {side: {row["source"] for row in rows} for side, rows in sides.items()}
        assert all(names.values()) and not names["train"] & names["valid"]
        mark = {"tables": "->", "digests": "sha256="}[domain]
        assert all(mark in row["text"] for rows in sides.values() for row in rows)


# ---- what the documentation says -------------------------------------------------------------------------


def test_the_documentations_figures_are_those_of_the_recorded_study() -> None:
    root = FOLDER.parents[1]
    text = (root / "docs" / "recipes" / "curriculum-study.md").read_text(encoding="utf-8")
    named = re.search(r"benchmarks/results/[\w.-]+\.json", text)
    assert named
    recorded = json.loads((root / named[0]).read_text(encoding="utf-8"))
    rows = {
        row[0].strip(" `"): row
        for row in (line.split("|")[1:-1] for line in text.splitlines() if "|" in line)
    }
    for name, arm in recorded["arms"].items():
        assert f"{arm['goal']:.4f}" in rows[name][2], name
        assert conclude.nats(arm["less_best_fixed"]["mean"]) in rows[name][3], name
    assert recorded["conclusion"][0] in " ".join(text.split())
