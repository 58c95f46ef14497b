"""What an edited configuration may change of a run that has begun: everything ahead, and nothing else."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci import files
from megatron_davinci.config import dump_config
from megatron_davinci.data import Journal, MixRecord
from megatron_davinci.errors import ConfigError, DataError
from megatron_davinci.train.edits import EditFile, Point
from megatron_davinci.train.forecast import Forecast
from tests.tiny import LENGTH, tiny_config, tiny_settings, write_source
from tests.train.recorded import changed, record_run

# Batches of 4 until step 12, then of 8; the first stage ends with step 30 (sample 192), the second with step 50.
A_THIRD = {"a": "1/3", "b": "2/3"}


@pytest.fixture
def root(tmp_path):
    """A run of which 20 steps are on record: the present begins at sample 112, step 21."""
    record_run(tiny_config(tmp_path), 20)
    return tmp_path


def ahead(config):
    """What is planned after the journal."""
    return [record for record, number in Forecast.read(config).records if number is None]


def refused(config):
    with pytest.raises(DataError) as error:
        Forecast.read(config)
    assert "its past is sealed" in str(error.value) and "begins at step 21 of stage first" in str(error.value)
    assert "sample 112, 3,584 tokens" in str(error.value)
    return str(error.value)


# ---- what may change -------------------------------------------------------------------------------------------


def test_the_same_configuration_changes_nothing(root):
    assert ahead(tiny_config(root)) == [MixRecord(192, "second", {"a": "0.2", "b": "0.8"})]


def test_another_mixture_of_the_stage_that_the_run_is_in_begins_with_the_present(root):
    record, second = ahead(changed(root, first={"mixture": {"a": 0.5, "b": 0.5}}))
    assert record == MixRecord(
        112,
        "first",
        {"a": "0.5", "b": "0.5"},
        origin="configuration",
        reason="the configuration had a 0.75, b 0.25 before",
    )
    assert second.first_sample == 192 and second.origin == ""


def test_steps_of_hundreds_of_sources_are_on_record_however_long_their_lines(root):
    path = root / "run" / "metrics.jsonl"
    told = {f"source-{n}": {"loss": 5.0, "tokens": 32, "weight": 32, "epoch": 0.1} for n in range(900)}
    lines = [{**json.loads(line), "sources": told} for line in path.read_text().splitlines()]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    for half in ("", whole[: len(whole) // 40]):  # of a line that is being written
        path.write_text(whole + half)
        assert ahead(changed(root, first={"mixture": {"a": 0.5, "b": 0.5}}))[0].first_sample == 112


def test_the_same_mixture_in_other_words_is_no_change(root):
    assert len(ahead(changed(root, first={"mixture": {"b": "1/4", "a": "0.750"}}))) == 1


def test_a_stage_to_come_may_change_as_a_whole(root):
    config = changed(
        root,
        second={"mixture": {"b": 1}, "global_batch_size": 16, "tokens": 640 * LENGTH, "transforms": {}},
        third={"mixture": A_THIRD},
    )
    second, third = ahead(config)
    assert (second.first_sample, dict(second.weights)) == (192, {"b": "1"})
    assert (third.first_sample, third.stage) == (832, "third")


def test_the_stage_that_the_run_is_in_may_become_longer_or_end_now(root):
    longer = changed(root, first={"tokens": 240 * LENGTH})
    assert ahead(longer)[0].first_sample == 240
    over = changed(root, first={"tokens": 112 * LENGTH}, second=None, third={"mixture": A_THIRD})
    assert [(r.first_sample, r.stage) for r in ahead(over)] == [(112, "third")]


def test_batches_and_rates_of_the_stage_may_change_from_here_on(root):
    batches = [{"size": 4, "steps": 12}, {"size": 8, "steps": 8}, {"size": 16}]
    rate = {"shape": "linear", "peak": 5e-3, "end": 0}
    config = changed(root, first={"global_batch_size": batches, "learning_rate": rate})
    assert Forecast.read(config).schedule.at(112).batch == 16
    assert ahead(config)[0].first_sample == 192


def test_a_source_may_join(root):
    write_source(root / "data" / "c", "c", 2)
    sources = {name: {"path": str(root / "data" / name)} for name in "abc"}
    settings = tiny_settings(root)
    settings["data"]["sources"] = sources
    first, second = settings["curriculum"]
    settings["curriculum"] = [
        {**first, "mixture": {"a": 0.5, "b": 0.25, "c": 0.25}},
        {**second, "mixture": {"c": 1}},
    ]
    config = tiny_config(root, **settings)
    assert [dict(record.weights) for record in ahead(config)] == [
        {"a": "0.5", "b": "0.25", "c": "0.25"},
        {"c": "1"},
    ]
    before = Forecast.read(tiny_config(root)).curriculum
    after = Forecast.read(config).curriculum
    assert [before.locate(n) for n in range(112)] == [after.locate(n) for n in range(112)]
    # What each source gave is carried on: no window of a or b comes again before its epoch is through.
    seen = [after.locate(n) for n in range(after.first_samples[-1] + 100)]
    assert len(set(seen)) == len(seen)


def test_a_source_that_was_never_mixed_may_go_and_one_that_was_may_not(tmp_path):
    sources = {name: {"path": str(tmp_path / "data" / name)} for name in "ab"}
    mixture = {"first": {"mixture": {"a": 1, "b": 0}}, "second": {"mixture": {"a": 1}}}
    record_run(changed(tmp_path, **mixture), 20)
    settings = tiny_settings(tmp_path)
    settings["data"]["sources"] = {"a": sources["a"]}
    settings["curriculum"] = [{**stage, "mixture": {"a": 1}} for stage in settings["curriculum"]]
    with pytest.raises(DataError, match="sources that the run does not have"):
        ahead(tiny_config(tmp_path, **settings))  # a weight of 0 names it, too
    settings["data"]["sources"] = {"b": sources["b"]}
    settings["curriculum"] = [{**stage, "mixture": {"b": 1}} for stage in settings["curriculum"]]
    with pytest.raises(DataError, match="a weight of 0 ends its use"):
        ahead(tiny_config(tmp_path, **settings))


def test_a_finished_run_may_get_another_stage(tmp_path):
    record_run(tiny_config(tmp_path), 50)
    third = ahead(changed(tmp_path, third={"mixture": A_THIRD}))
    assert [(record.first_sample, record.stage) for record in third] == [(352, "third")]


# ---- what may not ------------------------------------------------------------------------------------------------


def test_steps_that_were_taken_stay_and_all_that_differs_is_said_at_once(root):
    said = refused(changed(root, first={"global_batch_size": 8}).model_copy(update={"run": seeded(root, 8)}))
    assert "stage first: 12 steps of 4, 8 steps of 8 on record, 14 steps of 8 as configured" in said
    assert "seed: 7 on record, 8 as configured" in said


def test_a_stage_cannot_end_before_the_present(root):
    said = refused(changed(root, first={"tokens": 96 * LENGTH}))
    assert (
        "stage first: 12 steps of 4, 8 steps of 8 on record, 12 steps of 4, 6 steps of 8 as configured"
        in said
    )
    assert "stage second: no step on record, 2 steps of 8 as configured" in said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"mixture": {"a": 1}}, "mixture: a 0.75, b 0.25 on record, a 1 as configured"),
        ({"learning_rate": {"peak": 1e-3, "warmup_steps": 5}}, "learning_rate: {'shape': 'constant', 'peak': 0.01"),
        ({"tokens": 24 * 8 * LENGTH - 1}, "tokens: 6144 on record, 6143 as configured"),
    ],
)  # fmt: skip
def test_a_stage_that_is_over_stays_as_it_was(tmp_path, keys, said):
    record_run(tiny_config(tmp_path), 36)
    with pytest.raises(DataError) as error:
        Forecast.read(changed(tmp_path, first=keys))
    assert f"stage first is over; its {said}" in str(error.value)
    assert "begins at step 37 of stage second" in str(error.value)


def test_transforms_of_a_stage_that_has_begun_stay(root):
    said = refused(changed(root, first={"transforms": {"document_mask": True}}))
    assert "stage first has begun; its transforms cannot change" in said


def test_a_source_of_other_content_is_refused(root):
    settings = tiny_settings(root)
    settings["data"]["sources"] = {**settings["data"]["sources"], "b": settings["data"]["sources"]["a"]}
    assert "source b: other content than on record" in refused(tiny_config(root, **settings))


def test_what_the_journal_decided_beyond_the_steps_stays(root):
    # As a run leaves it that was killed at step 31, and went on from step 20.
    Journal.open(root / "run" / "journal.jsonl").append(MixRecord(192, "second", {"a": "0.2", "b": "0.8"}))
    with pytest.raises(DataError) as error:
        Forecast.read(changed(root, first={"tokens": 240 * LENGTH}))
    assert "line 2: stage second from sample 192 on" in str(error.value)
    assert "as configured, the stage begins at sample 240" in str(error.value)
    assert "begins at step 32 of stage second: sample 200" in str(error.value)
    # The mixture of the stage that has begun changes where nothing is decided yet.
    assert [r.first_sample for r in ahead(changed(root, second={"mixture": {"b": 1}}))] == [200]
    # It says nothing of the stage before, which only the configuration would contradict now.
    assert ahead(changed(root, first={"learning_rate": {"peak": 1e-3}})) == []


def test_without_the_last_configuration_the_journal_is_what_is_known(root):
    (root / "run" / "config.yaml").unlink()
    assert len(ahead(tiny_config(root))) == 1
    with pytest.raises(DataError, match=r"as configured, stage first from sample 0 on: a 0\.5, b 0\.5"):
        ahead(changed(root, first={"mixture": {"a": 0.5, "b": 0.5}}))


# ---- beside edits --------------------------------------------------------------------------------------------------


def test_an_edit_stands_whatever_the_configuration_said_before(root):
    config = tiny_config(root)
    edits = EditFile(root / "run" / "edits.jsonl")
    edits.add(Point(sample=130), {"b": "1"}, "more of b")
    edits.add(Point(stage="second"), A_THIRD, "less of b")
    edits.add(Point(), {"a": "1"}, "at once")
    found = ahead(config)
    assert [(r.first_sample, r.stage, r.origin, r.reason) for r in found] == [
        (112, "first", "edit-3", "at once"),
        (136, "first", "edit-1", "more of b"),  # the next boundary
        (192, "second", "edit-2", "less of b"),
    ]
    for record in found[:2]:
        Journal.open(root / "run" / "journal.jsonl").append(record)
    assert ahead(config) == found[2:]


def test_of_two_edits_at_one_step_the_later_one_holds_and_the_other_never_does(root):
    config = tiny_config(root)
    edits = EditFile(root / "run" / "edits.jsonl")
    edits.add(Point(sample=112), {"b": "1"}, "")
    edits.add(Point(), {"a": "1"}, "")
    (record, _) = ahead(config)
    assert (record.origin, record.first_sample) == ("edit-2", 112)
    Journal.open(root / "run" / "journal.jsonl").append(record)
    assert [r.origin for r in ahead(config)] == [""]


def test_an_edit_is_withdrawn_by_name_and_moves_with_its_stage(root):
    edits = EditFile(root / "run" / "edits.jsonl")
    edits.add(Point(stage="second"), {"b": "1"}, "")
    edits.add(Point(sample=150), {"b": "1"}, "")
    edits.withdraw("edit-2", "a mistake")
    assert [(r.first_sample, r.origin) for r in ahead(changed(root, first={"tokens": 240 * LENGTH}))] == [
        (240, "edit-1")
    ]


def test_a_configuration_that_changes_a_mixture_takes_the_place_of_its_edit(root):
    edits = EditFile(root / "run" / "edits.jsonl")
    edits.add(Point(stage="second"), {"b": "1"}, "")
    edits.add(Point(), {"b": "1"}, "")
    both = {"mixture": {"a": 0.5, "b": 0.5}}
    assert [(r.first_sample, r.origin) for r in ahead(changed(root, first=both, second=both))] == [
        (112, "configuration"),
        (192, ""),
    ]


def test_an_edit_that_the_configuration_does_not_allow_ends_the_start(root):
    edits = EditFile(root / "run" / "edits.jsonl")
    edits.add(Point(stage="third"), {"b": "1"}, "")
    edits.add(Point(), {"b": "0.4", "a": "0.5"}, "")
    edits.add(Point(), {"c": "1"}, "")
    with pytest.raises(ConfigError) as error:
        ahead(tiny_config(root))
    for said in ("edit-1: no stage third", "edit-2: the weights sum to 0.9, not to 1", "edit-3: no source c"):
        assert said in str(error.value)


def test_a_line_that_is_no_edit_is_named_and_one_that_is_being_written_waits(root):
    path = root / "run" / "edits.jsonl"
    EditFile(path).add(Point(), {"b": "1"}, "whole")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"edit": "edit-2", "fr')
    assert [edit.name for edit in EditFile(path).read().asked] == ["edit-1"]
    assert EditFile(path).add(Point(), {"a": "1"}, "").name == "edit-2"
    path.write_bytes(whole + whole)
    with pytest.raises(DataError, match=r"edits\.jsonl, line 2\n.*edit-1 where edit-2 belongs"):
        EditFile(path).read()


def test_the_configuration_that_was_edited_is_the_one_to_compare_with_next(root):
    edited = changed(root, first={"mixture": {"a": 0.5, "b": 0.5}})
    Journal.open(root / "run" / "journal.jsonl").append(ahead(edited)[0])
    assert [r.first_sample for r in ahead(edited)] == [192], "said again, it is no change"
    (root / "run" / "config.yaml").write_text(dump_config(edited))
    back = ahead(tiny_config(root))
    assert [(r.first_sample, dict(r.weights)) for r in back[:1]] == [(120, {"a": "0.75", "b": "0.25"})]


def seeded(root, seed):
    return tiny_config(root, run={"seed": seed}).run


@given(st.binary(max_size=40).map(lambda text: bytes(b"ab\n"[byte % 3] for byte in text)), st.integers(1, 9))
def test_lines_from_the_end_are_those_of_the_file_whatever_is_read_at_once(tmp_path_factory, text, at_once):
    path = tmp_path_factory.getbasetemp() / "lines"
    path.write_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_AT_ONCE", at_once)
        assert list(files.lines_from_the_end(path)) == text.split(b"\n")[-2::-1]


@pytest.mark.parametrize("damaged", [{}, [], {"starts": 5}, {"starts": [1]}])
def test_a_manifest_that_is_none_is_refused_before_a_start(root, damaged):
    (root / "run" / "manifest.json").write_text(json.dumps(damaged))
    with pytest.raises(DataError, match="manifest is not one"):
        Forecast.read(tiny_config(root))
