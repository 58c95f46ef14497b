"""The steps of a run as columns: the last attempt at each, whatever was taken before; lines are not kept."""

import tracemalloc
from dataclasses import fields

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.report.run_metrics import metrics_of

LOST = {"amax": 1.0, "scale": 2.0, "underflow": 0.0, "overflow": 0.5}
some = st.dictionaries(st.sampled_from("abc"), st.floats(-9, 9) | st.none() | st.just("x"), max_size=3)
line = st.fixed_dictionaries(
    {"step": st.integers(1, 9)},
    optional={
        "loss": st.floats(-9, 9) | st.none() | st.just(10**400),
        "stage": st.sampled_from(["one", "two"]),
        "phases": some | st.just(3),
        "sources": st.dictionaries(st.sampled_from("pq"), st.just({"loss": 1.5, "weight": 2}) | some),
        "phases_by_rank": st.dictionaries(st.sampled_from("pq"), st.just({"least": 1, "most": 3}) | some),
        "low_precision": st.just({"fc1": {"input": LOST}}),
    },
)


def same(a, b):
    for one in fields(a):
        x, y = getattr(a, one.name), getattr(b, one.name)
        if isinstance(x, dict):
            assert x.keys() == y.keys(), one.name
            x, y = list(x.values()), list(y.values())
        np.testing.assert_equal(x, y, err_msg=one.name)


@given(st.lists(line, max_size=30))
def test_a_step_taken_again_takes_the_place_of_all_from_it_on(lines):
    kept = [
        one for at, one in enumerate(lines) if all(one["step"] < later["step"] for later in lines[at + 1 :])
    ]
    found = metrics_of(iter(lines))
    same(found, metrics_of(kept))
    assert found.step.tolist() == [one["step"] for one in kept]
    assert found.stage == [one.get("stage", "") for one in kept]
    for row, one in enumerate(kept):
        known = isinstance(one.get("loss"), float)
        assert found["loss"][row] == one["loss"] if known else np.isnan(found["loss"][row])
        for name in "pq":
            said = one.get("sources", {}).get(name) == {"loss": 1.5, "weight": 2}
            at = found.source_loss[name][row].tolist() if name in found.source_loss else [0, 0]
            assert at == ([1.5, 2] if said else [0, 0])
        assert (row in found.low_precision) == ("low_precision" in one)
    for low, high in found.slowest.values():
        assert (low, high) == (1, 3)


def test_a_line_is_not_kept():
    names = [f"source-{n}" for n in range(20)]

    def lines():
        for step in range(2000):
            yield {"step": step, "loss": 1.0, "sources": {name: {"loss": 2.0, "weight": 8} for name in names}}

    tracemalloc.start()
    try:
        found = metrics_of(lines())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    held = sum(one.nbytes for one in (found.step, *found.columns.values(), *found.source_loss.values()))
    assert peak < 4 * held
