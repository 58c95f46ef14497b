"""The keyed shuffle is a bijection with an inverse, depends on all of its key, and looks random."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_davinci.data.permutation import MAX_SIZE, Permutation, radices, round_keys
from tests.cases import cases

seeds = st.integers(-(2**63), 2**63)


@given(size=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 2**40))
@example(size=1, seed=0, epoch=0)
@example(size=2, seed=0, epoch=0)
@example(size=3, seed=0, epoch=0)
@example(size=2**11, seed=0, epoch=0)
@example(size=45 * 45, seed=0, epoch=0)
@example(size=45 * 45 + 1, seed=0, epoch=0)
@cases(100)
def test_every_number_comes_once(size, seed, epoch):
    order = Permutation(size, round_keys(seed, "web", epoch)).many(np.arange(size))
    assert np.array_equal(np.sort(order), np.arange(size))


@given(data=st.data(), bits=st.integers(0, 62), seed=seeds)
@cases(300)
def test_one_by_one_equals_all_at_once_and_the_inverse_undoes_it(data, bits, seed):
    size = data.draw(st.integers(max(1, (1 << bits) // 2), 1 << bits))
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4))
    shuffle = Permutation(size, round_keys(seed, "web", 0))
    images = [shuffle(i) for i in positions]
    assert all(0 <= image < size for image in images)
    assert shuffle.many(np.array(positions)).tolist() == images
    assert [shuffle.inverse(image) for image in images] == positions


@given(size=st.integers(1, MAX_SIZE))
def test_radices_hold_the_size_with_less_than_one_row_to_spare(size):
    a, b = radices(size)
    assert size <= a * b < size + a
    assert b <= a <= 2**31


@pytest.mark.parametrize("size", [0, -1, MAX_SIZE + 1])
def test_sizes_out_of_range_are_refused(size):
    with pytest.raises(ValueError, match="2\\^62"):
        Permutation(size, round_keys(0, "web", 0))


def test_seed_source_and_epoch_each_change_the_order():
    keys = [(0, "web", 0), (1, "web", 0), (0, "code", 0), (0, "web", 1), (0, "1|web", 0), (10, "web", 1)]
    orders = {tuple(Permutation(100, round_keys(*key)).many(np.arange(100)).tolist()) for key in keys}
    assert len(orders) == len(keys)


def test_the_order_is_fixed_for_all_time():
    # A change here changes what every finished run is said to have read.
    assert [Permutation(1000, round_keys(7, "web", 2))(i) for i in range(6)] == [256, 383, 887, 283, 95, 259]


class TestItLooksRandom:
    """Statistics with seeds fixed, and bounds at which an honest shuffle fails less than once in 10^5."""

    size = 100_000

    @pytest.fixture(params=range(3), scope="class")
    def order(self, request) -> np.ndarray:
        return Permutation(self.size, round_keys(request.param, "web", 0)).many(np.arange(self.size))

    def test_where_blocks_go_is_uniform(self, order):
        # 20 x 20 cells of 250 expected each; the chi-square of 19^2 degrees of freedom has sigma sqrt(2 * 361).
        cells = np.histogram2d(np.arange(self.size), order, bins=20)[0]
        assert self.deviation(((cells - 250) ** 2 / 250).sum(), 361) < 4.5

    def test_displacement_has_no_favourite(self, order):
        shifts = (order - np.arange(self.size)) % self.size
        counts = np.histogram(shifts, bins=100, range=(0, self.size))[0]
        assert self.deviation(((counts - 1000) ** 2 / 1000).sum(), 99) < 4.5

    @pytest.mark.parametrize("lag", [1, 2, 316, 317, 1000])
    def test_neighbours_are_not_correlated(self, order, lag):
        # 316 and 317 are the radices: where a network with too few rounds would show.
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 4.5 / np.sqrt(self.size)

    def test_epochs_are_not_correlated(self, order):
        other = Permutation(self.size, round_keys(0, "web", 1)).many(np.arange(self.size))
        assert abs(np.corrcoef(order, other)[0, 1]) < 4.5 / np.sqrt(self.size)

    def test_the_checks_see_an_order_that_is_not_random(self):
        stride = (np.arange(self.size) * 317) % self.size
        assert abs(np.corrcoef(stride[:-1000], stride[1000:])[0, 1]) > 4.5 / np.sqrt(self.size)
        rotated = (np.arange(self.size) + 5) % self.size
        for check in (self.test_where_blocks_go_is_uniform, self.test_displacement_has_no_favourite):
            with pytest.raises(AssertionError):
                check(rotated)

    def test_small_sizes_reach_every_first_place(self):
        firsts = np.bincount(
            [Permutation(7, round_keys(seed, "web", 0))(0) for seed in range(3500)], minlength=7
        )
        assert abs(firsts - 500).max() < 4.5 * np.sqrt(500)

    @staticmethod
    def deviation(chi_square: float, freedom: int) -> float:
        return abs(chi_square - freedom) / np.sqrt(2 * freedom)
