"""Looking for a mixture by small runs: a predictor of loss from shares, what to try next, what to use, how sure.

As RegMix (Liu et al., 2024, arXiv 2407.01492), a regression over runs of drawn mixtures predicts the loss of others.
As CLIMB (Diao et al., 2025, arXiv 2504.13161), that is repeated: each round tries what the predictor of all rounds
before holds for good, and fits it again. The predictor is a Gaussian process over square roots of shares (in which a
percent counts more near none than near half; distances are Hellinger's), since it says how sure it is where nothing
was tried. A round's mixtures are Thompson's (1933): each is the best of one draw from what the predictor believes, so
that what is unsure is tried as often as it may be best.

A predictor that is too smooth is too sure. So what it says in the end is widened by how far each loss lies from what
the others predict of it, in the predictor's own deviations: the jackknife of conformal prediction (Barber et al.,
2021, arXiv 1905.02928), with deviations to scale its residuals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.errors import DataError

LEAST_MIXTURES = 4
_CANDIDATES = 800
_DRAWS = 400
_SPREAD = (40.0, 8.0)  # concentrations of Dirichlet draws: near a mixture, and around it
_PRIOR = {"length": (np.log(0.5), 0.7), "size": (0.0, 1.0), "noise": (np.log(0.1), 1.2)}  # of logarithms
_JITTER = 1e-8
_SLACK = 1e-9
_STEPS = (-1.0, 0.0, 1.0)  # of each logarithm, around the most probable


@dataclass(frozen=True)
class Bounds:
    """What mixtures may be tried.

    Attributes:
        floor: [k] least shares.
        ceiling: [k] largest shares.
    """

    floor: NDArray
    ceiling: NDArray

    def __post_init__(self) -> None:
        bad = (self.floor < 0) | (self.ceiling > 1) | (self.floor > self.ceiling)
        # Floats of decimals that sum to 1 may sum to a little more, or less.
        if bad.any() or self.floor.sum() > 1 + _SLACK or self.ceiling.sum() < 1 - _SLACK:
            raise DataError(
                "No mixture lies within these bounds.",
                found=f"floors {self.floor.tolist()}, ceilings {self.ceiling.tolist()}",
                expected="floors that sum to at most 1, ceilings to at least 1, none above the other",
            )

    def draw(self, around: NDArray, concentration: float, count: int, rng: np.random.Generator) -> NDArray:
        """[count, k] mixtures around one, within the bounds."""
        room = 1 - self.floor.sum()
        if room < _SLACK:
            return np.tile(self.floor, (count, 1))
        middle = np.maximum((around - self.floor) / room, 1e-3)
        alpha = np.maximum(concentration * middle / middle.sum(), 0.05)
        found = self.floor + room * rng.dirichlet(alpha, count)
        for _ in range(50):
            over = np.maximum(found - self.ceiling, 0)
            if not over.any():
                break
            # What is above a ceiling goes to those with room, by how much they have.
            found = np.minimum(found, self.ceiling)
            left = self.ceiling - found
            found += (
                over.sum(axis=1, keepdims=True) * left / np.maximum(left.sum(axis=1, keepdims=True), 1e-12)
            )
        return found / found.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Predictor:
    """A Gaussian process of loss over mixtures. Made by `fit_predictor`.

    Attributes:
        tried: [n, k] mixtures.
        level: Mean loss of those.
        unit: Standard deviation of those.
        length: Of the kernel, in Hellinger's distance.
        size: Of the kernel, in units.
        noise: Of a value, in units.
    """

    tried: NDArray
    level: float
    unit: float
    length: float
    size: float
    noise: float
    root: NDArray
    solved: NDArray

    def predict(self, mixtures: NDArray) -> tuple[NDArray, NDArray]:
        """[m] expected loss and [m] its standard deviation, for [m, k] mixtures; without the noise of a run."""
        mean, across = self._mean(mixtures)
        from scipy.linalg import solve_triangular

        half = solve_triangular(self.root, across.T, lower=True)
        variance = np.maximum(self.size**2 - (half**2).sum(axis=0), 0)
        return self.level + self.unit * mean, self.unit * np.sqrt(variance)

    def draws(self, mixtures: NDArray, count: int, rng: np.random.Generator) -> NDArray:
        """[count, m] losses that the predictor holds for possible, all mixtures together."""
        from scipy.linalg import solve_triangular

        mean, across = self._mean(mixtures)
        half = solve_triangular(self.root, across.T, lower=True)
        covariance = _kernel(mixtures, mixtures, self.length, self.size) - half.T @ half
        # Mixtures that lie close are nearly one: a millionth of the variance each keeps the root real.
        covariance[np.diag_indices(len(mean))] += 1e-6 * self.size**2
        root = np.linalg.cholesky(covariance)
        return np.asarray(self.level + self.unit * (mean + rng.standard_normal((count, len(mean))) @ root.T))

    def left_out(self) -> NDArray:
        """[n] how far each loss lies from what the others predict of it, in deviations of that prediction.

        Closed form, as the kernel and the noise stay: Dubrule (1983); Rasmussen & Williams (2006), 5.4.2.
        """
        from scipy.linalg import cho_solve

        precision = np.diag(cho_solve((self.root, True), np.eye(len(self.solved))))
        return np.asarray(self.solved / np.sqrt(precision))

    def widening(self, confidence: float = 0.95) -> float:
        """By how much intervals have to be wider than the predictor's own; 1 or more.

        The conformal quantile of `left_out`: the `ceil((n + 1) * confidence)`-th smallest of n, or the largest.

        Args:
            confidence: Of the intervals.
        """
        from scipy.stats import norm

        distances = np.sort(np.abs(self.left_out()))
        rank = min(len(distances), math.ceil((len(distances) + 1) * confidence))
        return max(1.0, float(distances[rank - 1] / norm.ppf((1 + confidence) / 2)))

    def _mean(self, mixtures: NDArray) -> tuple[NDArray, NDArray]:
        across = _kernel(mixtures, self.tried, self.length, self.size)
        return across @ self.solved, across


@dataclass(frozen=True)
class Proposal:
    """A mixture to use.

    Attributes:
        mixture: [k] shares.
        low: [k] lower ends of 95% intervals of the best shares.
        high: [k] upper ends.
        loss: Expected.
        loss_low: Lower end of its 95% interval.
        loss_high: Upper end.
        gain: Expected, against the first mixture tried.
        gain_low: Lower end of its 95% interval.
        gain_high: Upper end.
        better: Probability that it is better than the first.
        widened: How many times as wide the intervals are as the predictor's own.
    """

    mixture: NDArray
    low: NDArray
    high: NDArray
    loss: float
    loss_low: float
    loss_high: float
    gain: float
    gain_low: float
    gain_high: float
    better: float
    widened: float


def _kernel(a: NDArray, b: NDArray, length: float, size: float) -> NDArray:
    x, y = np.sqrt(np.maximum(a, 0)), np.sqrt(np.maximum(b, 0))
    squared = np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T, 0)
    return np.asarray(size**2 * np.exp(-squared / (2 * length**2)))


def fit_predictor(mixtures: NDArray, losses: NDArray) -> Predictor:
    """Fit by the highest probability of length, size and noise, under wide priors.

    Args:
        mixtures: [n, k] shares.
        losses: [n].

    Raises:
        DataError: Fewer than four mixtures, or a loss that is not finite.
    """
    return fit_predictors(mixtures, losses)[0][1]


def fit_predictors(mixtures: NDArray, losses: NDArray) -> list[tuple[float, Predictor]]:
    """The most probable predictor and others around it, each with its probability; the most probable first.

    So few runs leave open how smooth the loss is; what one predictor is sure of, others are not.

    Args:
        mixtures: [n, k] shares.
        losses: [n].

    Raises:
        DataError: Fewer than four mixtures, or a loss that is not finite.
    """
    from scipy.linalg import cho_solve
    from scipy.optimize import minimize

    y = np.asarray(losses, np.float64)
    if len(y) < LEAST_MIXTURES or not np.isfinite(y).all():
        raise DataError(
            "A predictor of mixtures needs losses of several mixtures.",
            found=f"{len(y)} losses: {y[:6].tolist()}",
            expected=f"{LEAST_MIXTURES} or more, all finite",
        )
    level, unit = float(y.mean()), max(float(y.std()), 1e-12)
    scaled = (y - level) / unit
    priors = list(_PRIOR.values())

    def root_of(theta: NDArray) -> NDArray:
        length, size, noise = np.exp(theta)
        matrix = _kernel(mixtures, mixtures, length, size)
        matrix[np.diag_indices(len(y))] += noise**2 + _JITTER
        return np.linalg.cholesky(matrix)

    def cost(theta: NDArray) -> float:
        root = root_of(theta)
        penalty = sum(((value - middle) / spread) ** 2 for value, (middle, spread) in zip(theta, priors)) / 2
        return float(scaled @ cho_solve((root, True), scaled) / 2 + np.log(np.diag(root)).sum() + penalty)

    limits = [(np.log(0.05), np.log(5.0)), (np.log(0.05), np.log(20.0)), (np.log(1e-3), np.log(2.0))]
    fits = [
        minimize(
            cost,
            [np.log(length), 0.0, np.log(0.1)],
            method="L-BFGS-B",
            bounds=limits,
            options={"maxiter": 40},
        )
        for length in (0.3, 1.0)
    ]
    theta = min(fits, key=lambda one: one.fun).x
    steps = np.array(np.meshgrid(*[_STEPS] * 3, indexing="ij")).reshape(3, -1).T
    places = [np.clip(theta + step, *np.array(limits).T) for step in (np.zeros(3), *steps)]
    costs = np.array([cost(place) for place in places])
    # The most probable one is among the steps too, and counted there.
    share = np.append(0.0, np.exp(costs.min() - costs[1:]))
    found = []
    for place, weight in zip(places, share / share.sum(), strict=True):
        length, size, noise = (float(value) for value in np.exp(place))
        root = root_of(place)
        solved = cho_solve((root, True), scaled)
        found.append(
            (weight, Predictor(np.asarray(mixtures), level, unit, length, size, noise, root, solved))
        )
    return found


def propose(
    base: NDArray, tried: NDArray, losses: NDArray, bounds: Bounds, count: int, rng: np.random.Generator
) -> NDArray:
    """[count, k] mixtures to try next; of the first round the base and draws around it.

    Args:
        base: [k] where the search begins.
        tried: [n, k] so far.
        losses: [n] of those; lower is better.
        bounds: Of shares.
        count: How many.
        rng: Of the draws.
    """
    if not len(tried):
        return np.concatenate([base[None], bounds.draw(base, _SPREAD[1], count - 1, rng)])
    predictor = fit_predictor(tried, losses)
    found = _candidates(base, predictor, bounds, rng)
    best = np.argmin(predictor.draws(found, 4 * count, rng), axis=1)
    # The same candidate twice would teach less than another: of those drawn, the first so many that differ.
    chosen = list(dict.fromkeys(best.tolist()))[:count]
    for one in np.argsort(predictor.predict(found)[0]).tolist():
        if len(chosen) >= count:
            break
        if one not in chosen:
            chosen.append(one)
    return np.asarray(found[chosen])


def _candidates(base: NDArray, predictor: Predictor, bounds: Bounds, rng: np.random.Generator) -> NDArray:
    """Mixtures around the base, around the best that were tried, and around the best of these."""
    order = np.argsort(predictor.predict(predictor.tried)[0])
    middles = [base, *predictor.tried[order[:3]]]
    share = _CANDIDATES // (2 * len(middles) + 2)
    found = [bounds.draw(one, spread, share, rng) for one in middles for spread in _SPREAD]
    best = np.concatenate(found)[np.argmin(predictor.predict(np.concatenate(found))[0])]
    found += [bounds.draw(best, spread, share, rng) for spread in (_SPREAD[0], 8 * _SPREAD[0])]
    return np.concatenate(found)


def best_mixture(
    base: NDArray, tried: NDArray, losses: NDArray, bounds: Bounds, rng: np.random.Generator
) -> Proposal:
    """The mixture to use by all that was tried, and how sure it is.

    Args:
        base: [k] where the search began.
        tried: [n, k]; the first is what gains are counted from.
        losses: [n]; lower is better.
        bounds: Of shares.
        rng: Of the draws.
    """
    weighed = fit_predictors(tried, losses)
    found = _candidates(base, weighed[0][1], bounds, rng)
    likely = [(weight, one) for weight, one in weighed if weight > 0.01]
    parts = np.array([weight * one.predict(found)[0] for weight, one in likely])
    mean = parts.sum(axis=0) / sum(weight for weight, _ in likely)
    chosen = int(np.argmin(mean))
    counts = rng.multinomial(_DRAWS, [weight / sum(w for w, _ in likely) for weight, _ in likely])
    both = np.concatenate([tried[:1], found])
    drawn = np.concatenate(
        [one.draws(both, count, rng) for (_, one), count in zip(likely, counts, strict=True) if count]
    )
    widened = weighed[0][1].widening()
    drawn = drawn.mean(axis=0) + widened * (drawn - drawn.mean(axis=0))
    best = found[np.argmin(drawn[:, 1:], axis=1)]
    low, high = np.quantile(best, [0.025, 0.975], axis=0)
    mine, gains = drawn[:, 1 + chosen], drawn[:, 0] - drawn[:, 1 + chosen]
    ends, gained = np.quantile(mine, [0.025, 0.975]), np.quantile(gains, [0.025, 0.975])
    return Proposal(
        mixture=found[chosen],
        low=low,
        high=high,
        loss=float(mean[chosen]),
        loss_low=float(ends[0]),
        loss_high=float(ends[1]),
        gain=float(gains.mean()),
        gain_low=float(gained[0]),
        gain_high=float(gained[1]),
        better=float((gains > 0).mean()),
        widened=widened,
    )
