"""Whatever is asked for, whenever, however often the run is killed: one journal, no window lost or repeated."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.config.curriculum import Stage
from megatron_davinci.data.curriculum import Curriculum
from megatron_davinci.data.journal import Journal
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.edits import Edit, Edits, Point
from megatron_davinci.train.planned import planned_records, where_change_begins
from tests.tiny import LENGTH, tiny_config

NAMES = ("a", "b")
SHARES = ({"a": "1"}, {"b": "1"}, {"a": "1/3", "b": "2/3"}, {"a": "0.9", "b": "0.1"})
WINDOWS = {"a": 17, "b": 40}


@cache
def config_of(root):
    return tiny_config(Path(root))


@st.composite
def runs(draw):
    """Stages, and edits each with the step after which it is asked for."""
    stages = [
        Stage.model_validate(
            {
                "name": f"stage {number}",
                "tokens": draw(st.integers(1, 60)) * LENGTH,
                "mixture": draw(st.sampled_from(SHARES)),
                "global_batch_size": [{"size": 2, "steps": draw(st.integers(1, 5))}, {"size": 5}],
                "learning_rate": {"peak": 1e-3},
            }
        )
        for number in range(draw(st.integers(1, 3)))
    ]
    schedule = Schedule(stages, LENGTH)
    asked = []
    for number in range(draw(st.integers(0, 4))):
        after = draw(st.integers(0, schedule.total_steps - 1))
        point = draw(
            st.one_of(
                st.just(Point()),
                st.integers(0, schedule.total_samples + 9).map(lambda n: Point(sample=n)),
                st.integers(0, len(stages) - 1).map(lambda n: Point(stage=f"stage {n}")),
            )
        )
        asked.append((after, Edit(f"edit-{number + 1}", point, draw(st.sampled_from(SHARES)), "why")))
    # An edit's number says when it was asked for.
    afters = sorted(after for after, _ in asked)
    asked = [(after, edit) for after, (_, edit) in zip(afters, asked, strict=True)]
    kills = draw(st.lists(st.tuples(st.integers(1, schedule.total_steps), st.integers(0, 6)), max_size=4))
    return schedule, stages, asked, kills


def take_steps(config, schedule, asked, kills=()):
    """What the trainer does: the journal that it leaves, and the samples of every step that stayed on record."""
    journal, kills, step, furthest = Journal.in_memory(), list(kills), 0, -1
    begins = [0]
    while begins[-1] < schedule.total_samples:
        begins.append(begins[-1] + schedule.at(begins[-1]).batch)
    taken = {}

    def plan(consumed):
        known = Edits(tuple(edit for after, edit in asked if after <= furthest))
        pending = known.pending(journal.mixes)
        return planned_records(config, schedule, {}, journal.mixes, pending, consumed=consumed)

    while step < schedule.total_steps:
        furthest = max(furthest, step)
        first, end = begins[step], begins[step + 1]
        for record in plan(first):
            if record.first_sample < end:
                journal.append(record)
        order = Curriculum(WINDOWS, 3, journal.mixes)
        taken[step] = [order.locate(n) for n in range(first, end)]
        step += 1
        if kills and kills[0][0] == step:
            # Resumed from an older checkpoint: what takes effect after the steps on record is decided at once.
            back = kills.pop(0)[1]
            furthest = max(furthest, step) if step < schedule.total_steps else furthest
            floor = where_change_begins(schedule, journal.mixes, begins[step])
            due = [
                record for record in plan(begins[step]) if floor is not None and record.first_sample <= floor
            ]
            if any(record.origin for record in due):
                for record in due:
                    journal.append(record)
            step = max(0, step - back)
    return journal, [one for number in range(schedule.total_steps) for one in taken[number]]


@settings(deadline=None, max_examples=25)
@given(run=runs())
def test_edits_lose_and_repeat_no_window_and_kills_change_nothing(run, tmp_path_factory):
    schedule, stages, asked, kills = run
    config = config_of(str(tmp_path_factory.getbasetemp())).model_copy(update={"curriculum": stages})
    journal, seen = take_steps(config, schedule, asked)
    # Each source passes through all of its windows before it repeats one.
    for name in NAMES:
        found = [(one.epoch, one.window) for one in seen if one.source == name]
        assert len(set(found)) == len(found)
        epochs = [epoch for epoch, _ in found]
        assert epochs == sorted(epochs)
        for epoch in range(max(epochs, default=0)):
            assert sorted(w for e, w in found if e == epoch) == list(range(WINDOWS[name]))
    # Before the first change nothing moves, and the journal alone gives the whole order.
    without, unchanged = take_steps(config, schedule, ())
    first = next((r.first_sample for r in journal.mixes if r.origin), schedule.total_samples)
    assert seen[:first] == unchanged[:first]
    replayed = Curriculum(WINDOWS, 3, journal.mixes)
    assert [replayed.locate(n) for n in range(schedule.total_samples)] == seen
    assert all(record.origin == "" for record in without.mixes)
    # Every record begins with a step of its stage, and every stage of steps has one.
    assert [schedule.at(r.first_sample).stage_name for r in journal.mixes] == [r.stage for r in journal.mixes]
    # However often it is killed, it is the same run.
    killed, again = take_steps(config, schedule, asked, sorted(kills))
    assert killed.records == journal.records and again == seen
