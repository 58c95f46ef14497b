"""Traces of chosen steps: they hold those steps and no other, with their phases."""

import gzip
import json

import pytest

from megatron_davinci.config.profile import ProfileConfig
from megatron_davinci.errors import ConfigError, EnvironmentProblem
from megatron_davinci.train.profile import check_profile
from tests.ranks import run_ranks
from tests.tiny import tiny_settings, train_here


def test_neighbours_are_one_trace():
    assert ProfileConfig(steps=[9, 4, 3, 5]).traces() == [(3, 5), (9, 9)]
    assert ProfileConfig().traces() == []


def test_what_is_not_in_the_run_is_refused_all_at_once():
    with pytest.raises(ConfigError) as error:
        check_profile(ProfileConfig(steps=[3, 51], ranks=[0, 4]), ranks=4, total_steps=50)
    said = str(error.value)
    assert "51; the curriculum ends with step 50" in said and "4; the last rank is 3" in said
    check_profile(ProfileConfig(steps=[1, 50], ranks=[3]), ranks=4, total_steps=50)


def trace(path):
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def steps_in(events):
    named = {event["name"] for event in events if event.get("ph") == "X"}
    return sorted(int(name.split("#")[1]) for name in named if name.startswith("ProfilerStep#"))


@pytest.mark.long
def test_a_trace_holds_its_steps_and_their_phases(tmp_path):
    settings = tiny_settings(tmp_path, profile={"steps": [1, 4, 5], "ranks": [1], "shapes": True})
    settings["train"] |= {"stop_after_steps": 6}
    run_ranks(2, train_here, settings)
    folder = tmp_path / "run" / "profile"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == [
        f"step-0000000{step}/rank-1.{kind}" for step in (1, 4) for kind in ("ops.txt", "trace.json.gz")
    ]
    first, pair = (trace(folder / f"step-0000000{step}" / "rank-1.trace.json.gz") for step in (1, 4))
    assert len(steps_in(first)) == 1 and len(steps_in(pair)) == 2
    # Two micro-batches a rank at step 4: in two steps as many again.
    forwards = [event for event in pair if event.get("name") == "forward" and event["ph"] == "X"]
    optimizers = [event for event in pair if event.get("name") == "optimizer" and event["ph"] == "X"]
    assert len(forwards) == 2 * (4 // 2 // 2)
    assert len(optimizers) >= 2
    assert "aten::mm" in (folder / "step-00000004" / "rank-1.ops.txt").read_text()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 7))


def test_a_trace_that_cannot_be_written_ends_the_run_in_its_own_words(tmp_path):
    settings = tiny_settings(tmp_path, profile={"steps": [2], "ranks": [0]})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("in the way")
    with pytest.raises(EnvironmentProblem, match="writing a trace failed"):
        run_ranks(1, train_here, settings)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
