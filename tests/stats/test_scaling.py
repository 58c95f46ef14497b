"""Known laws and crossings are found with the coverage that is stated; what cannot be told is refused."""

import numpy as np
import pytest

from benchmarks import scaling_laws
from megatron_davinci.errors import DataError
from megatron_davinci.stats.crossover import trend
from megatron_davinci.stats.scaling import fit_scaling_law
from tests.cases import is_long

SIZES = np.geomspace(1e6, 3e7, 5)


def test_a_law_without_noise_is_found_as_it_is():
    law = fit_scaling_law(SIZES, 1.7 + 400 * SIZES**-0.35)
    assert (law.floor, law.coefficient, law.exponent) == pytest.approx((1.7, 400, 0.35), rel=1e-3)
    ahead = law.predict(3e9)
    assert ahead.low <= 1.7 + 400 * 3e9**-0.35 <= ahead.high and ahead.high - ahead.low < 1e-2
    n, d = (one.ravel() for one in np.meshgrid(SIZES, np.geomspace(2e7, 6e8, 4)))
    law = fit_scaling_law(n, 1.7 + 400 * n**-0.35 + 900 * d**-0.4, d)
    found = (law.floor, law.exponent, law.data_exponent, law.data_coefficient)
    assert law.of_data and found == pytest.approx((1.7, 0.35, 0.4, 900), rel=1e-2)
    with pytest.raises(ValueError, match="both"):
        law.predict(1e9)


def test_one_bad_run_does_not_move_it():
    n = np.repeat(SIZES, 3)
    y = (1.7 + 400 * n**-0.35) * (1 + 0.001 * np.random.default_rng(3).normal(size=len(n)))
    y[7] += 1.0
    assert fit_scaling_law(n, y).exponent == pytest.approx(0.35, abs=0.03)


def test_intervals_of_a_ladder_with_little_noise_hold_the_law():
    n, d = (one.ravel() for one in np.meshgrid(SIZES, np.geomspace(2e7, 6e8, 5)))
    held = []
    for seed in range(5):
        noise = 1 + 1e-4 * np.random.default_rng(seed).normal(size=len(n))
        law = fit_scaling_law(n, (1.7 + 400 * n**-0.35 + 900 * d**-0.4) * noise, d)
        for name, true in (("exponent", 0.35), ("data_exponent", 0.4), ("floor", 1.7)):
            found = law.interval(name)
            assert found.low < found.value < found.high
            held.append(found.low < true < found.high)
    assert sum(held) >= 12


def test_coverage_is_what_is_stated():
    found = scaling_laws.laws(200 if is_long() else 6, 5, of_data=False)
    if is_long():
        found |= scaling_laws.laws(200, 5, of_data=True)
    found |= scaling_laws.effects(3000 if is_long() else 300, 5)
    assert found["slope_coverage"] >= 0.92 and found["crossing_coverage"] >= 0.84
    assert found["false_trend_fraction"] <= (0.06 if is_long() else 0.1)
    for name in ("exponent", "floor", "prediction"):
        assert found[f"size_{name}_coverage"] >= (0.9 if is_long() else 0.66)
        assert found.get(f"size_and_data_{name}_coverage", 1) >= 0.88
    assert found["size_refused_fraction"] == 0


@pytest.mark.parametrize(
    ("sizes", "losses", "tokens", "said"),
    [
        ([1e6, 2e6, 4e6], [3, 2.8, 2.7], None, "Too few sizes"),
        ([1e6, 2e6, 4e6, 8e6], [3, 2.8, 2.7, float("nan")], None, "finite and above 0"),
        ([1e6, 2e6, 4e6, 8e6], [3, 2.8, 2.7], None, "size for each loss"),
        ([1e6, 2e6, 4e6, 8e6] * 3, [2.0, 2.2, 2.4, 2.6] * 3, None, "do not fall"),
        ([1e6, 3e6, 1e7, 3e7], [2.0, 2.4, 2.5, 2.9], None, "do not fall"),
        ([1e6, 2e6, 4e6, 8e6], [3, 2.8, 2.7, 2.6], [2e7, 4e7, 8e7, 1.6e8], "Too few sizes and budgets"),
        (np.geomspace(1e6, 1e8, 7), np.linspace(3, 2, 7), np.geomspace(2e7, 2e9, 7), "grow together"),
    ],
)
def test_what_cannot_be_told_is_refused(sizes, losses, tokens, said):
    with pytest.raises(DataError, match=said):
        fit_scaling_law(sizes, losses, tokens)


def test_a_trend_says_where_it_crosses():
    noise = np.array([-1e-3, 0, 1e-3])
    line = trend({size: 0.02 * np.log10(size / 1e8) + noise for size in (1e6, 1e7)})
    assert line.shrinks and not line.turns and line.slope == pytest.approx(0.02)
    assert line.crossing_low < 1e8 < line.crossing_high and line.crossing == pytest.approx(1e8)
    line = trend({size: 0.02 * np.log10(size / 1e7) + noise for size in (1e6, 1e8)})
    assert line.turns and not line.shrinks and line.crossing == pytest.approx(1e7)
    line = trend(dict.fromkeys((1e6, 1e8), 0.02 + noise))
    assert not line.sure and line.crossing is None
    line = trend({size: 0.02 * np.log10(size / 1e5) + noise for size in (1e6, 1e8)})
    assert line.sure and not line.shrinks and not line.turns
    assert trend({1e6: [0.1, 0.2]}) is None
