"""A file becomes a configuration, or everything that is wrong with it is said: the key, its line, what to write."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_davinci.config import RunConfig, dump_config, load_config
from megatron_davinci.errors import ConfigError
from tests.config import small

# Examples share a folder, each in its own turn; a busy machine is no fault.
UNMINDED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*/config.yaml"))


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert len(text.splitlines()) < 24, "an error is at most one screen"
    assert len(text) < 4000
    return text


def test_the_examples_load():
    assert EXAMPLES
    for path in EXAMPLES:
        assert isinstance(load_config(path), RunConfig)


def test_a_mistyped_key_names_the_nearest_and_the_line(tmp_path):
    path = small.write(tmp_path)
    lines = path.read_text().splitlines()
    for right, wrong in [
        ("hidden_size", "hiden_size"),
        ("sequence_length", "seqence_length"),
        ("learning_rate", "learningrate"),
        ("precision", "precison"),
        ("peak", "paek"),
        ("directory", "directry"),
        ("path", "pth"),
    ]:
        number = next(n for n, line in enumerate(lines) if line.strip().startswith(right))
        changed = [*lines]
        changed[number] = changed[number].replace(right, wrong)
        text = refused(small.write(tmp_path, "\n".join(changed)))
        assert f"{wrong} (line {number + 1}): unknown key; did you mean {right}?" in text
        assert str(path) in text


def test_a_mistyped_section_too(tmp_path):
    whole = small.settings()
    whole["optimiser"] = {}
    assert "optimiser (line" in (text := refused(small.write(tmp_path, whole)))
    assert "did you mean optimizer?" in text


def test_a_key_that_is_like_no_other_gets_the_list(tmp_path):
    whole = small.settings(checkpoint={"zzz": 1})
    assert (
        "unknown key; keys here: async_save, best_by, every_steps, export_hf, initial_weights, keep"
        in refused(small.write(tmp_path, whole))
    )


def test_the_best_checkpoints_are_those_by_a_loss_that_is_measured(tmp_path):
    assert "code acts with keep_best" in refused(small.write(tmp_path), "checkpoint.best_by=code")
    best = {"keep_best": 2, "best_by": "code"}
    assert "checkpoint.keep_best" in (text := refused(small.write(tmp_path, small.settings(checkpoint=best))))
    assert "data.validation is empty" in text
    whole = small.settings(checkpoint=best)
    whole["data"]["validation"] = {"web": "held-out"}
    text = refused(small.write(tmp_path, whole))
    assert "checkpoint.best_by" in text and "code is neither `mean` nor in data.validation (web)" in text
    whole["checkpoint"]["best_by"] = "web"
    assert load_config(small.write(tmp_path, whole)).checkpoint.best_by == "web"


def test_every_problem_is_said_at_once(tmp_path):
    whole = small.settings(model={"num_layers": -1, "widht": 2}, train={"precision": "fp64"})
    del whole["data"]["sequence_length"]
    whole["curriculum"][0]["tokens"] = "4 parsecs"
    text = refused(small.write(tmp_path, whole))
    assert "The configuration has 5 problems." in text
    for part in (
        "model.num_layers (line",
        "model.widht (line",
        "train.precision (line",
        "found 'fp64'",
        "data.sequence_length (line",
        "missing",
        "4 parsecs",
    ):
        assert part in text


def test_a_thousand_problems_are_still_one_screen(tmp_path):
    whole = small.settings()
    whole["train"] |= {f"key{n}": n for n in range(1000)}
    assert "and 988 more" in refused(small.write(tmp_path, whole))


def test_a_long_value_is_cut(tmp_path):
    whole = small.settings(train={"precision": "x" * 100_000}, model={"num_layers": "y" * 100_000})
    assert "train.precision" in refused(small.write(tmp_path, whole))


@pytest.mark.parametrize(
    ("key", "written"),
    [
        ("model.num_layers", "true"),
        ("optimizer.beta1", "yes"),
        ("train.threads", "on"),
        ("curriculum.0.learning_rate.warmup_steps", "no"),
    ],
)
def test_a_truth_value_is_no_number(tmp_path, key, written):
    assert f"{key} (command line): should be a number; found" in refused(
        small.write(tmp_path), f"{key}={written}"
    )
    assert "should be a number" in refused(small.write(tmp_path), "curriculum.0.global_batch_size=yes")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("curriculum.0.max_epochs={web: on}", "web should be a number; found True"),
        ("parallel.pipeline_layers=[1, yes]", "1 should be a number; found True"),
        ("profile.steps=[on]", "0 should be a number; found True"),
    ],
)
def test_nor_is_one_among_several(tmp_path, override, said):
    assert f"(command line): {said}" in refused(small.write(tmp_path), override)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"web": 0.5, "code": 0.4}, "the weights sum to 0.9, not to 1"),
        ({"web": 0.75, "code": 0.35}, "the weights sum to 1.1, not to 1"),
        ({"web": 0.5, "code": 0.499999}, "the weights sum to 0.999999, not to 1"),
        ({"web": 0, "code": 0}, "the weights sum to 0, not to 1"),
        ({"web": -0.5, "code": 1.5}, "the weight of web is negative: '-0.5'"),
        ({"web": "half", "code": 0.5}, "the weight of web is not a number: 'half'"),
        ({"web": True, "code": 0}, "a weight is a number; found True"),
        ({"web": float("nan"), "code": 1}, "the weight of web is not a number: 'nan'"),
        ({"web": float("inf"), "code": 1}, "the weight of web is not a number: 'inf'"),
        ({"web": "1e999", "code": 0}, "the weight of web exceeds 1"),
        ({"web": "1e999999999", "code": 0}, "the weight of web is not a number"),
        ({"web": "1e-999999999", "code": 1}, "the weight of web is not a number"),
        ({"wbe": 0.75, "code": 0.25}, "curriculum stage one mixes wbe; data.sources has web, code"),
        ({}, "mixture"),
    ],
)
def test_a_mixture_that_is_none_says_why(tmp_path, mixture, message):
    whole = small.settings()
    whole["curriculum"][0]["mixture"] = mixture
    assert message in refused(small.write(tmp_path, whole))


def test_weights_are_exact_decimals(tmp_path):
    whole = small.settings()
    whole["curriculum"][0]["mixture"] = {"web": 0.9, "code": 0.1}
    assert load_config(small.write(tmp_path, whole)).curriculum[0].mixture == {"web": "0.9", "code": "0.1"}
    whole["curriculum"][0]["mixture"] = {"web": "2/3", "code": "1/3"}
    assert load_config(small.write(tmp_path, whole)).curriculum[0].mixture == {"web": "2/3", "code": "1/3"}


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "at least one batch size"),
        ([{"size": 4, "steps": 2}], "the last holds to the end"),
        ([{"size": 4}, {"size": 8}], "every batch size but the last says for how many"),
        ([{"size": 4, "steps": 1, "tokens": "1k"}, {"size": 8}], "found steps and tokens"),
        ([{"size": 4, "samples": 3}], "the last holds to the end"),
        (0, "greater than 0"),
        ("four", "should be a valid integer, unable to parse string as an integer; found 'four'"),
    ],
)
def test_batch_sizes_that_cannot_be(tmp_path, phases, message):
    whole = small.settings()
    whole["curriculum"][0]["global_batch_size"] = phases
    assert message in refused(small.write(tmp_path, whole))


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ({"shape": "cosine", "peak": 1e-3}, "shape cosine needs `end`"),
        ({"shape": "constant", "peak": 1e-3, "end": 0}, "shape constant has no `end`"),
        ({"shape": "sine", "peak": 1e-3}, "'constant', 'linear', 'cosine', '1-sqrt' or 'wsd'"),
        ({"shape": "wsd", "peak": 1, "end": 0}, "wsd needs `decay_steps` or `decay_tokens`; found none"),
        (
            {"shape": "wsd", "peak": 1, "end": 0, "decay_steps": 2, "decay_tokens": 2},
            "decay_steps and decay_tokens",
        ),
        ({"shape": "wsd", "peak": 1, "decay_steps": 2}, "shape wsd needs `end`"),
        ({"shape": "linear", "peak": 1, "end": 0, "decay_steps": 2}, "`decay_steps` is of shape wsd"),
        ({"peak": 1, "decay": "linear"}, "`decay` is of shape wsd"),
        (
            {"shape": "wsd", "peak": 1, "end": 0, "decay": "exponential", "decay_steps": 2},
            "never arrives at 0",
        ),
        (
            {"peak": 1, "warmup_steps": 2, "warmup_tokens": "1k"},
            "`warmup_steps` or `warmup_tokens`, not both",
        ),
        ({"peak": 1, "warmup_from": 0.1}, "it needs `warmup_steps` or `warmup_tokens`"),
        ({"peak": 1, "warmup_tokens": "1k"}, "warm-up and decay take 1,000 tokens, and the stage has 256"),
        ({"peak": 1, "shape": "wsd", "end": 0, "warmup_tokens": 200, "decay_tokens": 57}, "take 257 tokens"),
        ({"peak": float("nan")}, "finite"),
        ({"peak": float("inf")}, "finite"),
    ],
)
def test_learning_rates_that_cannot_be(tmp_path, rate, message):
    whole = small.settings()
    whole["curriculum"][0]["learning_rate"] = rate
    assert message in refused(small.write(tmp_path, whole))


def test_what_needs_two_sections_is_checked_too(tmp_path):
    whole = small.settings(data={"sequence_length": 17})
    whole["curriculum"] *= 2
    text = refused(small.write(tmp_path, whole))
    assert "two stages of the curriculum have one name: one, one" in text
    assert "data.sequence_length (17) exceeds model.max_sequence_length (16)" in text


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("model.rope_scaling={kind: linear, factor: 2, low_freq_factor: 2}", "low_freq_factor acts with kind"),
        ("logging.sharpness_epsilon=0.01", "sharpness_epsilon acts with sharpness_every_steps"),
    ],
)  # fmt: skip
def test_what_would_not_act_is_refused(tmp_path, key, said):
    assert said in refused(small.write(tmp_path), key)


def test_a_number_that_yaml_takes_for_text_is_one_also_where_a_section_could_be(tmp_path):
    (stage,) = load_config(
        small.write(tmp_path), ["curriculum.0.global_batch_size='8'", "curriculum.0.max_epochs=1e1"]
    ).curriculum
    assert [phase.size for phase in stage.global_batch_size] == [8] and stage.max_epochs == {"all": 10}


def test_overrides_win_and_reach_everything(tmp_path):
    config = load_config(
        small.write(tmp_path),
        [
            "run.seed=7",
            "curriculum.0.tokens=2M",
            "curriculum.0.global_batch_size=[{size: 2, steps: 3}, {size: 8}]",
            "curriculum.0.mixture=null",
            "curriculum.0.mixture.web=1",
            "optimizer.beta2=0.99",
            "data.validation.web=held out",
            "run.directory=a=b",
        ],
    )
    assert config.run.seed == 7
    assert config.curriculum[0].tokens == 2_000_000
    assert [phase.size for phase in config.curriculum[0].global_batch_size] == [2, 8]
    assert config.curriculum[0].mixture == {"web": "1"}
    assert config.optimizer.beta2 == 0.99
    assert config.data.validation == {"web": Path("held out")}
    assert config.run.directory == Path("a=b")


def test_the_last_override_of_a_key_wins(tmp_path):
    assert load_config(small.write(tmp_path), ["run.seed=1", "run.seed=2"]).run.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed", "not of the form key=value"),
        ("=7", "not of the form key=value"),
        ("run.sed=7", "run.sed (command line): unknown key; did you mean seed?"),
        ("curriculum.1.tokens=2M", "expected: a number from 0 to 0"),
        ("curriculum.one.tokens=2M", "names a position that is not there"),
        ("curriculum.².tokens=2M", "names a position that is not there"),
        ("train.precision.deep=7", "goes below a plain value"),
        ("logging.tags.0=a", "expected: an item: the list is empty"),
        ("run.seed=[", "not valid YAML"),
        ("run.seed=2020-99-99", "not valid YAML"),
        ("run.seed=" + "[" * 1200, "not valid YAML"),
        ("run.seed=!!python/object/apply:os.system [true]", "not valid YAML"),
        ("model.num_layers=two", "model.num_layers (command line): should be a valid integer"),
        ("run.seed=0123", "0123 is 83 to YAML; write it so, or in quotes where it is text"),
        ("parallel.timeout_seconds=1:30", "1:30 is 90 to YAML"),
        ("parallel.timeout_seconds=1:30.5", "1:30.5 is 90.5 to YAML"),
    ],
)
def test_a_wrong_override_is_said(tmp_path, override, message):
    path = small.write(tmp_path, small.settings(logging={"tags": []}))
    assert message in refused(path, override).replace("  ", " ").replace("  ", " ")


def test_what_an_override_replaced_is_not_looked_for_in_the_file(tmp_path):
    whole = small.settings()
    whole["curriculum"][0]["global_batch_size"] = [{"size": 2, "steps": 3}, {"size": 4}]
    path, override = small.write(tmp_path, whole), "curriculum.0.global_batch_size=[a, b]"
    text = refused(path, override)
    for number in (0, 1):
        assert f"curriculum.0.global_batch_size.{number} (command line, '{override}'): " in text
    text = refused(path, "curriculum.0.global_batch_size.1.size=two", override)
    assert "size=two" not in text


@pytest.mark.parametrize(
    ("override", "place", "read"),
    [
        ("data.sources={no: {path: web}}", "data.sources", "False"),
        ("data.validation={2024: web}", "data.validation", "2024"),
        ("parallel={on: 1}", "parallel", "True"),
    ],
)
def test_a_name_that_yaml_reads_as_something_else_is_to_be_quoted(tmp_path, override, place, read):
    text = refused(small.write(tmp_path), override)
    assert f"{place} (command line): YAML reads a name as {read}; write it in quotes" in text


@pytest.mark.parametrize(
    ("written", "read"), [("1_1", "11"), ("no", "False"), ("1.0", "1.0"), ("2026-11-27", "datetime.date")]
)
def test_text_that_yaml_reads_as_something_else_is_to_be_quoted(tmp_path, written, read):
    text = refused(small.write(tmp_path), f"curriculum.0.name={written}")
    assert f"curriculum.0.name (command line): should be text, and YAML reads it as {read}" in text
    assert "write it in quotes" in text


@pytest.mark.parametrize("value", ["5", "true", "", "[web]"])
def test_a_path_that_is_none_is_one_problem(tmp_path, value):
    text = refused(small.write(tmp_path), f"data.sources.web.path={value}")
    assert "The configuration has a problem." in text
    assert "data.sources.web.path (command line): should be a path or s3://BUCKET/KEY; found " in text


def test_an_override_changes_one_place_even_where_the_file_shares_it(tmp_path):
    whole = small.settings()
    shared = whole["curriculum"][0]
    whole["curriculum"] = [shared, {**shared, "name": "two"}]
    path = small.write(tmp_path, whole)
    assert "*id" in path.read_text(), "the file shares one mapping by an alias"
    config = load_config(path, ["curriculum.0.learning_rate.peak=5"])
    assert [stage.learning_rate.peak for stage in config.curriculum] == [5, 1e-3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty or not a mapping"),
        ("- a\n- b", "empty or not a mapping"),
        ("just words", "empty or not a mapping"),
        ("a: [1, 2", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("run: !!python/object/apply:os.system ['exit 3']", "not valid YAML"),
        ("run: !!python/name:os.system", "not valid YAML"),
        ("run: 2020-99-99", "not valid YAML"),
        ("a: &x [*x]", "unknown key"),
        ("run: &x {directory: *x}", "run"),
        ("? [1]\n: 2", "not valid YAML"),
        ("1: 2", "1"),
        ("[" * 1200, "not valid YAML"),
        ("run: {directory: a}\nrun: {directory: b}", "written twice"),
        ("run: {directory: a, seed: 010}", "010 is 8 to YAML"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path, text, message):
    assert message in refused(small.write(tmp_path, text))


@pytest.mark.parametrize(
    "place", ["a: {}", "run: {{seed: {}}}", "curriculum: [{{tokens: {}}}]", "curriculum: {}"]
)
def test_an_alias_bomb_does_not_go_off(tmp_path, place):
    levels = ["l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 30)]
    refused(small.write(tmp_path, "\n".join([*levels, place.format("*l29")])))


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\x80\x02}q\x00.")
    assert "cannot be read" in refused(path)
    path.write_bytes(b"run: \x00\x01")
    assert "not valid YAML" in refused(path)
    assert "cannot be read" in refused(tmp_path)
    assert "There is no such configuration." in refused(tmp_path / "none.yaml")


junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=30, deadline=None, suppress_health_check=UNMINDED)
@given(data=st.data())
def test_junk_anywhere_is_a_config_error_or_a_configuration(tmp_path, data):
    whole = small.settings()
    target = whole
    while True:
        key = data.draw(st.sampled_from(range(len(target)) if isinstance(target, list) else sorted(target)))
        if not isinstance(target[key], dict | list) or data.draw(st.booleans()):
            break
        target = target[key]
    target[key] = data.draw(junk)
    path = small.write(tmp_path, yaml.safe_dump(whole, allow_unicode=True))
    try:
        outcome = load_config(path)
    except ConfigError as error:
        outcome = str(error)
    assert isinstance(outcome, RunConfig) or len(outcome.splitlines()) < 24


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_a_dumped_configuration_is_read_back_equal(tmp_path, path):
    config = load_config(path, ["run.seed=9", "train.stop_after_steps=3"])
    (tmp_path / "dumped.yaml").write_text(dump_config(config), encoding="utf-8")
    again = load_config(tmp_path / "dumped.yaml")
    assert again == config
    assert dump_config(again) == dump_config(config)


@settings(max_examples=30, deadline=None, suppress_health_check=UNMINDED)
@example(name="\x85", peak=0.0, tokens=1, share=0)
@example(name="a \u2028b\u2029", peak=0.0, tokens=1, share=0)
@given(
    name=st.text(min_size=1, max_size=10),
    peak=st.floats(0, 1),
    tokens=st.integers(1, 10**15),
    share=st.integers(0, 1000),
)
def test_any_values_survive_the_dump(tmp_path, name, peak, tokens, share):
    whole = small.settings()
    whole["curriculum"][0] |= {
        "name": name,
        "tokens": tokens,
        "learning_rate": {"peak": peak},
        "mixture": {"web": f"{share}/1000", "code": f"{1000 - share}/1000"},
    }
    try:
        config = load_config(small.write(tmp_path, whole))
    except ConfigError:  # a name that YAML cannot hold, such as a lone surrogate
        return
    (tmp_path / "dumped.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "dumped.yaml") == config


def test_the_user_s_folder_is_meant_by_a_tilde_in_any_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    names = ("run.directory", "data.tokenizer", "data.sources.web.path", "data.validation.web")
    settings = [*(f"{name}=~/x" for name in names), "checkpoint.initial_weights=~/x"]
    config = load_config(small.write(tmp_path), settings)
    read = (config.run.directory, config.data.tokenizer, config.data.sources["web"].path)
    others = (config.data.validation["web"], config.checkpoint.initial_weights)
    assert {*read, *others} == {Path("/home/somebody/x")}
    config = load_config(small.write(tmp_path), ["run.directory=a~/~b", "data.sources.web.path=s3://~/x"])
    assert config.run.directory == Path("a~/~b") and config.data.sources["web"].path == "s3://~/x"
