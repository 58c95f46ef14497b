"""Policies: whatever they wish, shares stay within bounds and sum to 1 exactly, and nothing follows from a NaN."""

from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.config import validate
from megatron_davinci.config.controller import UNITS, ControllerConfig
from megatron_davinci.config.source_weights import exact_text
from megatron_davinci.data import MixRecord
from megatron_davinci.errors import DataError
from megatron_davinci.stats.forecast import HORIZON, forecast, lately
from megatron_davinci.train import controller
from megatron_davinci.train.controller import Controller
from megatron_davinci.train.policies import make_policy
from megatron_davinci.train.policies.bounded import as_text, decide, within_bounds
from megatron_davinci.train.policies.returns import look
from megatron_davinci.train.policies.saturation import largest_first
from megatron_davinci.train.policies.situation import Bounds, Evaluation, Situation
from megatron_davinci.train.run_directory import RunDirectory
from tests.tiny import tiny_settings

TOTAL = 1000


@st.composite
def bounded_mixtures(draw):
    """A present mixture within bounds that are possible, and a wish."""
    count = draw(st.integers(1, 6))
    names = [f"d{i}" for i in range(count)]
    cuts = sorted(draw(st.lists(st.integers(0, UNITS), min_size=count - 1, max_size=count - 1)))
    parts = [b - a for a, b in zip([0, *cuts], [*cuts, UNITS])]
    present = {name: Fraction(part, UNITS) for name, part in zip(names, parts)}
    floors = {n: Fraction(draw(st.integers(0, int(p * UNITS))), UNITS) for n, p in present.items()}
    ceilings = {n: Fraction(draw(st.integers(int(p * UNITS), UNITS)), UNITS) for n, p in present.items()}
    change = Fraction(draw(st.integers(1000, UNITS)), UNITS)
    wish = {n: draw(st.floats(0, 1e6)) for n in names}
    wish[names[0]] += 1e-3
    return present, Bounds(floors, ceilings, change), wish


@settings(max_examples=150, deadline=None)
@given(bounded_mixtures())
def test_any_wish_becomes_a_mixture_within_bounds_that_sums_to_one_exactly(case):
    present, bounds, wish = case
    found = within_bounds(wish, present, bounds)
    assert sum(found.values()) == 1
    for name, share in found.items():
        assert bounds.floors[name] <= share <= bounds.ceilings[name]
        assert abs(share - present[name]) <= bounds.maximum_change
        assert Fraction(as_text(share)) == share
    MixRecord(0, "stage", {name: as_text(share) for name, share in found.items()})
    free = {name: value / sum(wish.values()) for name, value in wish.items()}
    if all(
        max(bounds.floors[n], present[n] - bounds.maximum_change)
        <= free[n]
        <= min(bounds.ceilings[n], present[n] + bounds.maximum_change)
        for n in free
    ):
        assert all(abs(float(found[n]) - free[n]) < 2e-6 * len(free) for n in free), "a wish that may be, is"


@settings(max_examples=100, deadline=None)
@given(bounded_mixtures(), st.sampled_from([2.0, 1.5, 1.0]))
def test_large_plans_go_first_within_bounds_and_what_a_bound_takes_is_spread_in_proportion(case, power):
    present, bounds, wish = case
    plan = {name: value / sum(wish.values()) for name, value in wish.items()}
    found = largest_first(plan, Situation((), present, bounds, TOTAL), power)
    assert sum(found.values()) == pytest.approx(1, abs=1e-6)
    free = []
    for name, share in found.items():
        low = max(bounds.floors[name], present[name] - bounds.maximum_change)
        high = min(bounds.ceilings[name], present[name] + bounds.maximum_change)
        assert float(low) - 1e-9 <= share <= float(high) + 1e-9
        if float(low) + 1e-6 < share < float(high) - 1e-6 and plan[name] > 1e-3:
            free.append(share / plan[name] ** power)
    assert not free or max(free) == pytest.approx(min(free), rel=1e-3)


def test_a_wish_alone_would_leave_the_bounds():
    present = {"a": Fraction(1, 2), "b": Fraction(1, 2)}
    bounds = Bounds({"a": Fraction(2, 5)}, {}, Fraction(3, 10))
    assert within_bounds({"b": 1.0}, present, bounds) == {"a": Fraction(2, 5), "b": Fraction(3, 5)}
    third = {"a": Fraction(1, 3), "b": Fraction(2, 3)}
    assert within_bounds({"a": 1 / 3, "b": 2 / 3}, third, bounds) == third, "an unchanged share stays exact"


@settings(max_examples=100, deadline=None)
@given(bounded_mixtures(), st.data())
def test_a_mixture_that_an_edit_took_out_of_its_bounds_comes_back_to_them(case, data):
    inside, bounds, wish = case
    bounds = replace(bounds, maximum_change=max(bounds.maximum_change, Fraction(1, 20)))
    names = list(inside)
    parts = data.draw(st.lists(st.integers(1, 1000), min_size=len(names), max_size=len(names)))
    present = {name: Fraction(part, sum(parts)) for name, part in zip(names, parts)}

    def outside(name, share):
        return max(bounds.floors[name] - share, share - bounds.ceilings[name], Fraction(0))

    found = within_bounds(wish, present, bounds)
    assert sum(found.values()) == 1
    for name, share in found.items():
        assert outside(name, share) <= outside(name, present[name]) + Fraction(1, UNITS)
        assert abs(share - present[name]) <= bounds.maximum_change
    for _ in range(3 + int(len(names) / bounds.maximum_change)):
        if not any(outside(name, share) for name, share in found.items()):
            break
        found = within_bounds(wish, found, bounds)
    assert found == present or not any(outside(name, share) for name, share in found.items())


def test_a_mixture_out_of_its_bounds_moves_by_the_largest_change():
    present = {"a": Fraction(0), "b": Fraction(1)}
    bounds = Bounds({"a": Fraction(1, 5)}, {}, Fraction(1, 10))
    once = within_bounds({"a": 0.1, "b": 0.9}, present, bounds)
    assert once == {"a": Fraction(1, 10), "b": Fraction(9, 10)}
    assert within_bounds({"a": 0.15, "b": 0.85}, once, bounds) == {"a": Fraction(1, 5), "b": Fraction(4, 5)}


@pytest.mark.parametrize("wish", [{"a": float("nan")}, {"a": -1.0, "b": 2.0}, {}, {"a": 0.5, "c": 0.5}])
def test_a_wish_that_is_no_mixture_is_refused(wish):
    with pytest.raises(DataError, match="no mixture"):
        within_bounds(wish, {"a": Fraction(1, 2), "b": Fraction(1, 2)}, Bounds({}, {}, Fraction(1, 10)))


def situation(curves, mixture, count=30, total=TOTAL, bounds=None, training=None, pools=None):
    """`count` evaluations of curves (functions of own tokens), at a constant mixture."""
    rng = np.random.default_rng(0)
    evaluations = []
    for i in range(1, count + 1):
        tokens = total * i // 40
        given_ = {name: int(tokens * 10**6 * share) for name, share in mixture.items()}
        evaluations.append(
            Evaluation(
                step=i,
                tokens=tokens * 10**6,
                unit_tokens=given_,
                heldout={
                    name: curve(given_[name] / 1e6) + rng.normal(0, 0.002) for name, curve in curves.items()
                },
                training={name: curve(i) for name, curve in (training or {}).items()},
            )
        )
    shares = {name: Fraction(str(share)) for name, share in mixture.items()}
    return Situation(
        tuple(evaluations),
        shares,
        bounds or Bounds({}, {}, Fraction(1, 10)),
        total * 10**6,
        pools or {},
    )


def policy(name, **sections):
    return make_policy(ControllerConfig.model_validate({"mode": "apply", "policy": name, **sections}))


def growing(n):
    return 4 - 0.3 * np.log(n)


def saturated(n):
    return 4 - 0.3 * np.log(min(n, 60))


def test_share_goes_from_what_has_saturated_to_what_grows():
    seen = situation({"general": saturated, "code": growing}, {"general": 0.6, "code": 0.4})
    found = decide(policy("saturation"), seen)
    assert found.mixture == {"general": Fraction(1, 2), "code": Fraction(1, 2)}, "by the largest change"
    assert "general saturated" in found.reason and "code growing" in found.reason
    assert found.details["general"]["knee_tokens"] == pytest.approx(60e6, rel=0.15)


@pytest.mark.parametrize("forgets", [0.0, 0.3])
def test_all_domains_tell_together_whether_the_model_forgets(forgets):
    steps = np.arange(1, 41)[:, None]
    shares = np.where(steps <= 20, [[0.5, 0.3, 0.2]], [[0.2, 0.3, 0.5]])
    given_ = np.cumsum(shares * 1e7, axis=0)
    total = given_.sum(axis=1)
    latest = np.stack([lately(own, total - own, HORIZON * 1e9) for own in given_.T], axis=1)
    known = given_ ** (1 - forgets) * latest**forgets
    losses = 2 + 1.5 * (1 + known / 2e7) ** -0.4 + np.random.default_rng(1).normal(0, 0.004, known.shape)
    seen = tuple(
        Evaluation(
            i + 1, int(total[i]), dict(zip("abc", given_[i].tolist())), dict(zip("abc", losses[i].tolist()))
        )
        for i in range(40)
    )
    now = Situation(seen, dict.fromkeys("abc", Fraction(1, 3)), Bounds({}, {}, Fraction(1, 10)), 10**9)
    found = [outlook.forecast for outlook in look(now, list("abc")).values()]
    alone = [forecast(own, total - own, y, 1e9).forgets for own, y in zip(given_.T, losses.T)]
    odds = np.prod([p / (1 - p) for p in alone])
    assert all(one.forgets == pytest.approx(odds / (1 + odds), rel=1e-6) for one in found)
    assert all(one.weight.sum() == pytest.approx(1) for one in found)
    assert found[0].forgets > 0.99 if forgets else found[0].forgets < 0.01
    assert max(min(p, 1 - p) for p in alone) > 0.05, "one alone is not sure"


def test_with_few_evaluations_nothing_moves():
    seen = situation({"general": saturated, "code": growing}, {"general": 0.6, "code": 0.4}, count=5)
    found = decide(policy("saturation"), seen)
    assert not found.changes and "not enough is known" in found.reason


def test_the_format_shifts_only_when_all_plain_text_has_saturated():
    mixture = {"general": 0.5, "code": 0.4, "qa": 0.1}
    qa_last = policy("saturation", saturation={"format_domains": ["qa"]})
    before = decide(
        qa_last, situation({"general": saturated, "code": growing, "qa": growing}, mixture, total=1500)
    )
    assert before.mixture["qa"] == Fraction(1, 10) and before.mixture["general"] < Fraction(1, 2)
    after = decide(
        qa_last, situation({"general": saturated, "code": saturated, "qa": growing}, mixture, total=1500)
    )
    assert after.mixture["qa"] == Fraction(2, 10) and "format shifts to qa" in after.reason


def test_upsampling_waits_for_the_last_part_of_the_run():
    upsampling = {"final_fraction": 0.2, "mixture": {"general": "0.3", "code": "0.7"}}
    late = policy("domain_upsampling", domain_upsampling=upsampling)
    curves, mixture = {"general": growing, "code": growing}, {"general": 0.6, "code": 0.4}
    assert not decide(late, situation(curves, mixture, count=31)).changes
    assert decide(late, situation(curves, mixture, count=32)).mixture["code"] == Fraction(1, 2)


def test_a_small_domain_is_held_at_its_share_and_halved_when_it_overfits():
    special = policy("specialised", specialised={"domain": "music", "share": "0.04"})
    mixture = {"general": 0.96, "music": 0.04}
    flat = situation({"general": growing, "music": growing}, mixture, training={"music": lambda i: 2.0})
    assert not decide(special, flat).changes, "a gap that only shrinks is none"
    memorised = situation(
        {"general": growing, "music": lambda n: 3.0},
        mixture,
        training={"music": lambda i: 3 - 0.02 * i},
        pools={"music": 5 * 10**6},
    )
    found = decide(special, memorised)
    assert found.mixture["music"] == Fraction(2, 100) and "overfits (6.00 epochs" in found.reason
    early = situation({"general": growing, "music": growing}, {"general": 0.99, "music": 0.01})
    assert decide(special, early).mixture["music"] == Fraction(4, 100)


def test_loss_weighting_raises_what_lies_furthest_above_the_reference():
    weighted = policy("loss_weighted", loss_weighted={"reference": {"a": 2.0, "b": 2.0, "c": 9.0}})
    curves = {"a": lambda n: 2.5, "b": lambda n: 2.1, "c": lambda n: 3.0}
    mixture = decide(weighted, situation(curves, {"a": 0.4, "b": 0.3, "c": 0.3})).mixture
    assert mixture["a"] > Fraction(2, 5) and mixture["b"] < Fraction(3, 10) and mixture["c"] < mixture["b"]


@pytest.mark.parametrize("name", ["fixed", "saturation", "domain_upsampling", "specialised", "loss_weighted"])
def test_a_nan_is_a_named_error_for_every_policy(name):
    seen = situation({"general": growing, "code": lambda n: float("nan")}, {"general": 0.5, "code": 0.5})
    with pytest.raises(DataError, match="held-out loss of code") as error:
        decide(policy(name), seen)
    assert "step 1" in error.value.render()


def test_the_same_situation_gives_the_same_decision():
    seen = situation({"general": saturated, "code": growing}, {"general": 0.6, "code": 0.4})
    assert decide(policy("saturation"), seen) == decide(policy("saturation"), seen)


def test_shares_read_back_as_they_are():
    assert (
        as_text(Fraction(1, 4)) == "0.25" and as_text(Fraction(1)) == "1" and as_text(Fraction(1, 3)) == "1/3"
    )
    assert as_text(Fraction(0)) == "0" and exact_text(Fraction(1, 4)) == "0.25"


def test_to_decide_looks_at_each_step_of_the_record_once(tmp_path, monkeypatch):
    asked = []

    class Line(dict):
        def __getitem__(self, key):
            asked.append(key)
            return super().__getitem__(key)

    policy = {"mode": "advise", "policy": "specialised", "specialised": {"domain": "a"}}
    made = tiny_settings(tmp_path, controller=policy, evaluation={"every_steps": 2})
    made["data"]["validation"] = {name: str(tmp_path / "data" / name) for name in ("a", "b")}
    config = validate(made, where="test")
    directory = RunDirectory(tmp_path)
    steps = [Line(step=n, sources={"a": {"loss": 2.0 + n, "weight": 1}}) for n in range(1, 101)]
    steps.append(Line(step=101))
    evaluations = [
        {"step": n, "consumed_samples": n, "consumed_tokens": n, "heldout_loss": {"a": 2.0}}
        for n in range(2, 101, 2)
    ]
    found = {directory.metrics: steps, directory.evaluations: evaluations}
    monkeypatch.setattr(controller, "read_lines", found.__getitem__)
    order = SimpleNamespace(curriculum=SimpleNamespace(consumed=lambda sample: {"a": sample, "b": 0}))
    looked_back = Controller(config, order, directory)._evaluations(100)
    assert [one.training["a"] for one in looked_back[:2]] == [3.5, 5.5] and len(looked_back) == 50
    assert asked.count("step") < 3 * len(steps)
