"""A design says what is compared; what could explain a difference beside it is refused, by name."""

import random

import pytest
import yaml

from benchmarks.lab_calibration import CONFOUNDS, FACTORS, base, confounds, put
from megatron_davinci.errors import ConfigError
from megatron_davinci.lab.arms import arms_of, as_override, identity, runs_of
from megatron_davinci.lab.control import check, differences, refuse
from megatron_davinci.lab.design import load_design
from tests.cli.screen import davinci

RATE = "curriculum.0.learning_rate.peak"


def written(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump(base()))
    design = {
        "question": "Does half the rate lose anything?",
        "base": "base.yaml",
        "varies": [RATE],
        "arms": {"control": {}, "half": {"set": {RATE: 1.5e-3}}},
        "seeds": [1, 2, 3],
        "metrics": [{"name": "heldout_loss.mean", "margin": 0.01}],
        **changes,
    }
    path = folder / "design.yaml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in design.items() if value is not None}, sort_keys=False)
    )
    return path


def loaded(folder, **changes):
    design = load_design(written(folder, **changes))
    return design, arms_of(design)


def test_a_clean_design_is_accepted_and_its_one_difference_named(tmp_path):
    design, arms = loaded(tmp_path)
    assert check(design, arms) == [] and [arm.name for arm in arms] == ["control", "half"]
    assert differences(arms) == {RATE: {"control": 3e-3, "half": 1.5e-3}}
    screen = davinci("lab", "check", tmp_path / "design.yaml")
    assert screen.code == 0 and "differ in nothing else. 6 runs" in " ".join(screen.out.split())


def test_many_arms_are_rows_that_can_be_read(tmp_path):
    rates = {f"rate-{i}": {"set": {RATE: i * 1e-4}} for i in range(1, 12)}
    written(tmp_path, arms={"control": {}, **rates})
    screen = davinci("lab", "check", tmp_path / "design.yaml")
    rows = [line for line in screen.out.splitlines() if "rate-" in line]
    assert screen.code == 0 and len(rows) == len(rates) and "rate-11 " in rows[-1] and "0.0011" in rows[-1]


@pytest.mark.parametrize("name", CONFOUNDS)
def test_every_confound_is_refused_by_its_key(name, tmp_path):
    setting = FACTORS[0][1]
    arm = base()
    for key, value in {**setting, **CONFOUNDS[name]}.items():
        put(arm, key, value)
    (tmp_path / "arm.yaml").write_text(yaml.safe_dump(arm))
    arms = {"control": {}, "changed": {"config": "arm.yaml"}}
    design, found = loaded(tmp_path, arms=arms, varies=FACTORS[0][0])
    with pytest.raises(ConfigError) as refused:
        refuse(design, found, "design.yaml")
    assert next(iter(CONFOUNDS[name])) in str(refused.value)
    assert "changed has" in str(refused.value) and "control has" in str(refused.value)


def test_confounds_drawn_at_random(tmp_path):
    found = confounds(tmp_path, 6, random.Random(5).randrange(1000))
    assert found["confounds_caught_fraction"] == found["clean_designs_accepted_fraction"] == 1.0


def test_unequal_budgets_and_wear_are_refused_unless_meant(tmp_path):
    more = {"control": {}, "longer": {"set": {"curriculum.0.tokens": 81920}}}
    design, arms = loaded(tmp_path / "tokens", arms=more, varies=["curriculum.0.tokens"])
    assert [one.kind for one in check(design, arms)] == ["tokens"]
    design, arms = loaded(
        tmp_path / "meant",
        arms=more,
        varies=["curriculum.0.tokens"],
        allow={"unequal tokens": "it is the question"},
    )
    assert check(design, arms) == []
    small = {"data.sources.a.tokens": "15k", "data.sources.b.tokens": "1M"}
    mixed = {"control": {}, "more a": {"set": {"curriculum.0.mixture": {"a": 0.9, "b": 0.1}}}}
    design, arms = loaded(tmp_path / "wear", arms=mixed, varies=["curriculum.0.mixture"], overrides=small)
    [one] = check(design, arms)
    assert one.kind == "repetition" and "source a: control 1.3" in one.what and "more a 2.4" in one.what
    flops = {"control": {}, "wider": {"set": {"model.ffn_hidden_size": 128}}}
    design, arms = loaded(
        tmp_path / "flops", arms=flops, varies=["model.ffn_hidden_size"], held_constant="flops"
    )
    assert [one.kind for one in check(design, arms)] == ["flops"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--noise", "nan"], "--noise"),
        (["--noise", "-1"], "not below 0"),
        (["--effect", "0"], "other than 0"),
        (["--alpha", "2"], "--alpha"),
        (["--comparisons", "0"], "--comparisons"),
    ],
)
def test_power_that_no_number_of_seeds_has_is_refused(words, said):
    screen = davinci("lab", "power", "--noise", "0.01", "--effect", "0.01", *words)
    assert said in screen.refusal()


def test_factors_are_combined(tmp_path):
    factors = {
        "rate": {"key": RATE, "levels": {"low": 1e-3, "high": 3e-3}},
        "beta": {"key": "optimizer.beta2", "levels": {"95": 0.95, "99": 0.99}},
        "clip": {"key": "optimizer.clip_grad_norm", "levels": {"1": 1.0, "half": 0.5}},
    }
    counts = {}
    for combine in ("full", "one-at-a-time", "half"):
        design, arms = loaded(tmp_path, arms=None, varies=None, factors=factors, combine=combine)
        assert check(design, arms) == []
        counts[combine] = [arm.name for arm in arms]
    assert [len(names) for names in counts.values()] == [8, 4, 4]
    assert counts["half"][0] == counts["one-at-a-time"][0] == "rate=low, beta=95, clip=1"
    # In the half, every level of a factor meets every level of another equally often.
    for a, b in (("rate=low", "beta=99"), ("rate=high", "clip=half"), ("beta=95", "clip=1")):
        assert sum(a in name and b in name for name in counts["half"]) == 1


def test_identity_is_what_a_run_computes(tmp_path):
    _, arms = loaded(tmp_path)
    one, other = (arm.with_seed(1) for arm in arms)
    assert identity(one) != identity(other) and identity(one) != identity(arms[0].with_seed(2))
    moved = one.model_copy(update={"run": one.run.model_copy(update={"directory": tmp_path / "x"})})
    assert identity(moved) == identity(one)
    design = load_design(tmp_path / "design.yaml")
    assert len({run.identity for run in runs_of(design)}) == 6


@pytest.mark.parametrize("value", [1e-3, "cosine", {"a": "1/3", "b": 0.5}, [1, 2], None, True, "yes", ""])
def test_a_setting_is_read_back_as_it_was(value):
    key, _, text = as_override("a.b", value).partition("=")
    assert key == "a.b" and yaml.safe_load(text) == value


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": {"control": {}}}, "two arms"),
        ({"arms": None}, "either `arms`"),
        ({"varies": []}, "`varies` is missing"),
        ({"seeds": [1, 1]}, "seeds should differ"),
        ({"metrics": []}, "metrics"),
        ({"metrics": [{"name": "heldout_loss.mean"}]}, "margin"),
        ({"arm": {}}, "unknown key; did you mean arms?"),
        ({"control": "nobody"}, "control should be one of"),
    ],
)
def test_what_is_no_design_is_refused(changes, said, tmp_path):
    with pytest.raises(ConfigError) as refused:
        load_design(written(tmp_path, **changes))
    assert said in str(refused.value) and "design.yaml" in str(refused.value)


def test_a_metric_that_an_arm_lacks_one_seed_and_a_budget(tmp_path):
    design, arms = loaded(tmp_path / "m", metrics=[{"name": "heldout_loss.code", "margin": 0.1}], seeds=[1])
    assert {one.kind for one in check(design, arms)} == {"measurement", "seeds"}
    design, arms = loaded(tmp_path / "b", budget={"runs": 4})
    with pytest.raises(ConfigError, match="costs more than its budget") as refused:
        refuse(design, arms, "design.yaml")
    assert "6 runs" in str(refused.value)
    with pytest.raises(ConfigError, match="no such configuration"):
        load_design(tmp_path / "nowhere.yaml")


def test_a_template_is_a_design(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(base()))
    assert davinci("lab", "new", tmp_path / "new.yaml").code == 0
    design = load_design(tmp_path / "new.yaml")
    assert check(design, arms_of(design)) == []
    assert davinci("lab", "new", tmp_path / "new.yaml").code == 2


@pytest.mark.parametrize(
    "question", ["GQA: does it help? # of heads", "Does [WSD] beat [/cosine] :smile: now?"]
)
def test_a_question_is_shown_as_it_was_asked(tmp_path, question):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(base()))
    assert davinci("lab", "new", tmp_path / "new.yaml", "--question", question).code == 0
    shown = davinci("lab", "check", tmp_path / "new.yaml")
    assert shown.code == 0 and shown.out.startswith(question + "\n")


def test_tokens_of_a_ratio_that_are_none_are_refused(tmp_path):
    words = ("--stage", "1-1", "--domain", "a", "--general", "b", "--tokens", "4 mice")
    assert "no token count" in davinci("lab", "ratio", written(tmp_path), *words).refusal()
