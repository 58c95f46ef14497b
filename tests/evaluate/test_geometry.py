"""RankMe and alpha-ReQ on spectra that are known."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_davinci.errors import DataError
from megatron_davinci.evaluate.geometry import alpha_req, geometry, rank_me


def states_with(eigenvalues: np.ndarray, sequences: int, seed: int = 0) -> np.ndarray:
    """[sequences, d] centred states whose covariance has just these eigenvalues."""
    generator = np.random.default_rng(seed)
    d = len(eigenvalues)
    noise = generator.normal(size=(sequences, d))
    noise -= noise.mean(0)
    left = np.linalg.qr(noise)[0]
    right = np.linalg.qr(generator.normal(size=(d, d)))[0]
    return left @ np.diag(np.sqrt(eigenvalues * sequences)) @ right.T


@pytest.mark.parametrize("d", [1, 4, 32])
def test_all_directions_alike_have_rank_d(d):
    assert geometry(states_with(np.ones(d), 100)).rank_me == pytest.approx(d)


def test_one_direction_has_rank_one():
    states = np.outer(np.arange(10.0), np.ones(6))
    assert geometry(states).rank_me == pytest.approx(1.0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.3])
@pytest.mark.parametrize(("sequences", "d"), [(200, 40), (30, 29)])
def test_a_power_law_gives_its_exponent(alpha, sequences, d):
    values = np.arange(1, d + 1) ** -alpha
    found = geometry(states_with(values, sequences) + 7.0)  # the mean is taken out
    assert found.alpha_req == pytest.approx(alpha, abs=1e-6)
    p = values / values.sum()
    assert found.rank_me == pytest.approx(float(np.exp(-(p * np.log(p)).sum())))
    assert (found.sequences, found.dimensions) == (sequences, d)


def test_the_first_eigenvalues_and_what_is_noise_are_outside_the_slope():
    values = np.concatenate([[1e3, 1e2], np.arange(3, 20) ** -1.5, np.full(5, 1e-12)])
    assert alpha_req(values) == pytest.approx(1.5)
    assert np.isnan(alpha_req(values[:4]))


def test_fewer_sequences_than_channels_have_the_same_spectrum():
    states = np.random.default_rng(1).normal(size=(20, 50))
    full = np.linalg.eigvalsh(np.cov(states.T, bias=True))[::-1]
    assert geometry(states).rank_me == pytest.approx(rank_me(np.clip(full, 0, None)))


def test_what_has_no_geometry_is_refused():
    with pytest.raises(DataError, match="two texts with tokens are needed"):
        geometry(np.empty((0, 3)))
    for states in (np.ones((1, 3)), np.full((4, 3), np.nan), np.ones((4, 3))):
        with pytest.raises(DataError, match="no geometry"):
            geometry(states)
