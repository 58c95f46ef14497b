"""Phases: every moment of a step is in one of them, whatever begins inside what."""

import copy
import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.train.phases import BETWEEN_STEPS, PHASES, PhaseTimers, phase_of
from megatron_davinci.train.rank_spread import RankSpread
from tests.ranks import run_ranks
from tests.tiny import tiny_settings, train_here

IN_STEPS = [name for name in PHASES if name not in BETWEEN_STEPS]


class Seconds:
    """A stopwatch whose time passes when it is told to. With `lag`, like a device that is behind."""

    def __init__(self, lag=0):
        self.now, self.lag, self.waited, self.given_back, self.seen = 0.0, lag, [], [], []

    def mark(self):
        return self.now

    def wait(self, moment):
        self.waited.append(moment)

    def between(self, begin, end):
        return end - begin

    def release(self, moments):
        self.given_back += moments

    def push(self, name):
        self.seen.append(f"+{name}")

    def pop(self):
        self.seen.append("-")


def test_a_phase_inside_another_is_taken_out_of_it():
    watch = Seconds()
    timers = PhaseTimers(watch)
    watch.now = 1.0
    with timers.phase("optimizer"):
        watch.now = 3.0
        timers("params-all-gather", log_level=1).start(barrier=True)
        watch.now = 7.0
        timers("params-all-gather").stop()
        watch.now = 8.0
    watch.now = 8.5
    timers.end_step()
    [phases] = timers.finished()
    assert {name: seconds for name, seconds in phases.items() if seconds} == {
        "optimizer": 3.0,
        "parameter_gather": 4.0,
        "other": 1.5,
    }
    assert list(phases) == IN_STEPS
    assert watch.seen == ["+optimizer", "+parameter_gather", "-", "-"]


def test_a_step_that_is_not_applied_leaves_no_phase_to_the_next():
    watch = Seconds()
    timers = PhaseTimers(watch)
    with timers.phase("optimizer"):
        timers("optimizer-clip-main-grad").start()  # what refuses the step comes before its stop
    timers.begin()
    watch.now += 2.0
    with timers.phase("data"):
        watch.now += 1.0
    timers.end_step()
    [phases] = timers.finished()
    assert (phases["optimizer"], phases["data"], phases["other"]) == (0.0, 1.0, 2.0)
    assert sum(1 if one[0] == "+" else -1 for one in watch.seen) == 0


def test_evaluation_and_saving_are_whole_and_said_with_the_step_after_them():
    watch = Seconds()
    timers = PhaseTimers(watch)
    with timers.phase("evaluation"):
        watch.now = 1.0
        timers("forward-compute", log_level=2).start()
        watch.now = 4.0
        timers("forward-compute").stop()
    timers("forward-compute").start()
    watch.now = 6.0
    timers("forward-compute").stop()
    timers.end_step()
    timers.end_step()
    first, second = timers.finished()
    assert (first["evaluation"], first["forward"]) == (4.0, 2.0)
    assert "evaluation" not in second


def test_a_device_that_is_behind_is_asked_a_step_later_and_its_moments_are_used_again():
    watch = Seconds(lag=1)
    timers = PhaseTimers(watch)
    for step in (1, 2):
        with timers.phase("forward"):
            watch.now += step
        timers.end_step()
        found = timers.finished()
        assert len(found) == step - 1
    assert found[0]["forward"] == 1.0 and watch.waited == [1.0]
    assert len(watch.given_back) == 3  # of 4: the moment at which the second step began is kept
    assert [phases["forward"] for phases in timers.finished(wait=True)] == [2.0]
    assert timers.finished(wait=True) == []


def test_what_is_left_by_another_than_it_began_still_adds_up():
    # Megatron-Core's combined schedule begins a backward inside a forward and ends the forward first.
    watch = Seconds()
    timers = PhaseTimers(watch)
    timers("forward-compute").start()
    watch.now = 1.0
    timers("backward-compute").start()
    watch.now = 3.0
    timers("forward-compute").stop()
    watch.now = 4.0
    timers("backward-compute").stop()
    timers("backward-compute").stop()  # once too often
    timers.end_step()
    [phases] = timers.finished()
    assert (phases["forward"], phases["backward"], phases["other"]) == (1.0, 3.0, 0.0)


@given(st.lists(st.tuples(st.sampled_from([*IN_STEPS, "up"]), st.integers(0, 5)), max_size=40))
def test_phases_add_up_to_the_step(moves):
    watch = Seconds()
    timers = PhaseTimers(watch)
    expected, open_phases = dict.fromkeys(IN_STEPS, 0), []
    for move, seconds in moves:
        if move != "up":
            timers._phases[PHASES.index(move)].start()
            open_phases.append(move)
        elif open_phases:
            timers._phases[PHASES.index(open_phases.pop())].stop()
        watch.now += seconds
        expected[open_phases[-1] if open_phases else "other"] += seconds
    timers.end_step()
    assert timers.finished() == [expected]


def test_megatrons_names():
    assert phase_of("forward-backward") is None
    assert phase_of("forward-backward-send-forward-backward-recv") == "pipeline"
    assert phase_of("batch-generator") is None
    assert PhaseTimers(Seconds())("forward-backward").start(barrier=True) is None


def test_every_name_that_is_mapped_is_one_of_megatrons():
    import inspect

    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import distrib_optimizer, optimizer
    from megatron.core.pipeline_parallel import p2p_communication, schedules

    from megatron_davinci.train.phases import _OF_MEGATRON

    modules = (finalize_model_grads, distrib_optimizer, optimizer, p2p_communication, schedules)
    text = "".join(inspect.getsource(inspect.getmodule(module)) for module in modules)
    assert [name for name in _OF_MEGATRON if f"timers('{name}'" not in text] == []
    assert "timers('forward-recv'" in text


def test_a_copied_configuration_has_the_same_timers():
    timers = PhaseTimers(Seconds())
    chunk = SimpleNamespace(config=SimpleNamespace(timers=None))
    inner = SimpleNamespace(config=SimpleNamespace(timers=None))
    timers.attach([chunk], SimpleNamespace(config=None, chained_optimizers=[inner]))
    assert copy.deepcopy(chunk.config).timers is timers is inner.config.timers


def test_switched_off_nothing_is_attached_and_nothing_is_said():
    timers = PhaseTimers(None)
    chunk = SimpleNamespace(config=SimpleNamespace(timers=None))
    timers.attach([chunk], None)
    with timers.phase("forward"):
        timers.end_step()
    assert chunk.config.timers is None and timers.finished(wait=True) == []


def spread_of(steps):
    import torch.distributed as dist

    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose

    platform = choose("cpu", threads=1)
    distributed.start(platform, seed=1)
    rank = dist.get_rank()
    spread = RankSpread(platform, every=2)
    zero = dict.fromkeys(IN_STEPS, 0.0)
    return [
        spread.add({**zero, "forward": 0.1 * (rank + 1) * (step + 1), "data": 0.0}) for step in range(steps)
    ]


def test_ranks_are_compared_every_so_many_steps():
    for found in run_ranks(3, spread_of, 5):
        assert [one is None for one in found] == [True, False, True, False, True]
        # Steps 1 and 2 take (0.1 + 0.2) / 2 on rank 0, and three times that on rank 2, which is the straggler.
        assert found[1] == {"forward": {"least": 0.15, "most": 0.45, "rank": 2}}
        assert found[3]["forward"] == {"least": 0.35, "most": 1.05, "rank": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("phases")
    settings = tiny_settings(
        root, parallel={"device": "cpu", "pipeline": 2}, checkpoint={"every_steps": 5},
        evaluation={"every_steps": 5}, train={"stop_after_steps": 8}, logging={"every_steps": 4},
    )  # fmt: skip
    settings["train"] |= {"micro_batch_size": 2, "precision": "fp32", "threads": 1}
    run_ranks(4, train_here, settings)
    return root / "run"


def test_a_run_says_where_each_steps_time_went(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    adds_up = []
    for line in lines:
        phases = line["phases"]
        busy = ("forward", "backward", "pipeline", "gradient_sync", "optimizer", "parameter_gather", "data")
        assert all(phases[name] > 0 for name in busy)
        after_evaluation = line["step"] == 6
        assert {"evaluation", "checkpoint"} & set(phases) == (
            {"evaluation", "checkpoint"} if after_evaluation else set()
        )
        in_step = sum(phases[name] for name in IN_STEPS)
        adds_up.append(in_step == pytest.approx(line["seconds"], rel=1e-2, abs=1e-4))
    # Both clocks are read one after the other, and in between another process may be let run.
    assert sum(adds_up) >= 5
    spread = {line["step"]: line["phases_by_rank"] for line in lines if "phases_by_rank" in line}
    assert list(spread) == [4, 8]
    for phase in spread[8].values():
        assert 0 <= phase["least"] <= phase["most"] and 0 <= phase["rank"] < 4
    [evaluation] = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    assert evaluation["seconds"] == pytest.approx(lines[5]["phases"]["evaluation"], rel=0.5)
