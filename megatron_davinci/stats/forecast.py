"""What a loss will be after more tokens: offset power laws, with and without a knee, weighed by how well they fit.

With D what a model knows of a domain, `D = own + transfer * others` in tokens, its loss is `E + A (1 + d / s)^-b`: a
power law with an offset, as a domain's loss follows where something was learnt elsewhere (Hernandez et al., 2021,
arXiv 2102.01293). Up to a knee k, d is D; after it `k (D / k)^r`: the share r of growth is left (a broken power law:
Caballero et al., 2023, arXiv 2210.14891).

For every place of a knee (and for none), every r and every transfer of a grid, E, A, b and s are fitted by damped
least squares, all at once, and each fit is weighed by its probability with b and s integrated out (Laplace's
method). What is expected is the mean over all of them: what the measurements do not tell is averaged, not guessed.
That a knee may lie ahead is part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.stats.noise import difference_noise, effective_count, robust_scale

HAZARD = 0.3
"""Of a knee, an e-fold of what is known, before anything is measured."""
RATIOS = np.array([0.0, 0.1, 0.25])
"""r, after a knee."""
TRANSFERS = np.array([0.0, 0.03])
"""What a token of another domain is worth; all as likely."""
_KNEES = 24
_MOST_POINTS = 48
_LATEST = 16  # points at the end that are kept apart; a knee may be at each
_EXPONENT_PRIOR = (np.log(0.25), 0.8)  # a normal distribution of log b; loss curves lie near 0.05 to 0.5
_SCALE_DEVIATION = 2.0  # of log s, around the middle of the first evaluation and the budget
_STARTS = (3, 4)  # of b and of s
_ITERATIONS = 8
_OUTLIER = 2.5  # standard deviations
_LEAST_WEIGHT = 1e-3
_TRUST = (
    0.5  # of a point, as evidence: curves are never of quite the right family, and noise is estimated too
)


@dataclass(frozen=True)
class Forecast:
    """Curves worth counting, and where the trajectory has come to.

    Attributes:
        weight: [k] probability; sums to 1, or k is 0 where no curve that falls fits.
        size: [k] A, in the trajectory's units.
        exponent: [k] b.
        scale: [k] s, in tokens.
        knee: [k] k, in tokens; infinite where there is none yet.
        ratio: [k] r.
        transfer: [k] what a token of another domain is worth.
        noise: Standard deviation of one evaluation around the best curve.
    """

    weight: NDArray
    size: NDArray
    exponent: NDArray
    scale: NDArray
    knee: NDArray
    ratio: NDArray
    transfer: NDArray
    noise: float

    @property
    def kneed(self) -> float:
        """Probability that there was a knee."""
        return float(self.weight[np.isfinite(self.knee)].sum())

    def gains(self, own: NDArray, others: NDArray, hazard: float = HAZARD) -> NDArray:
        """By how much loss is expected to fall along a way.

        Args:
            own: [n] tokens of the domain, not falling; the first is what it has now.
            others: [n] tokens of all others, at the same time.
            hazard: Of a knee that lies ahead, an e-fold of what is known.

        Returns:
            [n] in the trajectory's units; 0 at first.
        """
        if not len(self.weight):
            return np.zeros(len(own))
        known = np.maximum(own + self.transfer[:, None] * others, 1e-9)
        d = _bent(known, self.knee[:, None], self.ratio[:, None])
        shape = np.exp(-self.exponent[:, None] * np.log1p(d / self.scale[:, None]))
        steps = (self.weight * self.size)[:, None] * (shape[:, :-1] - shape[:, 1:])
        # Growth that has not ended may yet do so.
        survives = (known[:, :1] / np.sqrt(known[:, 1:] * known[:, :-1])) ** hazard
        left = survives + RATIOS.mean() * (1 - survives)
        steps = np.where(np.isinf(self.knee)[:, None], left * steps, steps)
        return np.concatenate([[0.0], np.cumsum(steps.sum(axis=0))])


def forecast(own: NDArray, others: NDArray, values: NDArray, budget: float) -> Forecast:
    """Weigh curves for the held-out loss of a domain.

    Args:
        own: [n] tokens of the domain at each evaluation, not falling and above 0; repeated ones as what they are
            worth. At least 5.
        others: [n] tokens of all others.
        values: [n] loss.
        budget: Tokens of the whole run.
    """
    own, others, values, count = condensed(own, others, values)
    unit = max(float(np.ptp(values)), 1e-12)
    fits = _Fits(own, others, (values - values[-1]) / unit, count, budget)
    fits.improve(_ITERATIONS // 2)
    fits.draw_in()
    fits.improve(_ITERATIONS - _ITERATIONS // 2)
    return fits.forecast(unit, values[-1])


def condensed(own: NDArray, others: NDArray, values: NDArray) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """A trajectory of at most 48 points: outliers are drawn in, and means taken where it was long ago.

    Args:
        own: [n] not falling.
        others: [n].
        values: [n].

    Returns:
        Each in [at most 48], and of how many points each is the mean.
    """
    n = len(values)
    if n >= 5:
        # A point far off the line through its neighbours, further than they are off theirs, is an outlier.
        apart = np.maximum(own[2:] - own[:-2], 1e-9)
        left = (own[2:] - own[1:-1]) / apart
        line = values.copy()
        line[1:-1] = left * values[:-2] + (1 - left) * values[2:]
        off = np.abs(values - line)
        beside = np.maximum(np.append(off[1:], 0), np.append(0, off[:-1]))
        limit = 4 * difference_noise(np.arange(n, dtype=float), values) * np.sqrt(1.5)
        values = np.where((off > limit) & (off > 1.3 * beside), line, values)
    if n <= _MOST_POINTS:
        return own, others, values, np.ones(n)
    edges = np.linspace(0, n - _LATEST, _MOST_POINTS - _LATEST + 1).round().astype(int)
    starts = np.concatenate([edges[:-1], np.arange(n - _LATEST, n)])
    count = np.diff(np.append(starts, n)).astype(float)
    own, others, values = (np.add.reduceat(v, starts) / count for v in (own, others, values))
    return own, others, values, count


def _bent(known: NDArray, knee: NDArray, ratio: NDArray) -> NDArray:
    """d of what is known; broadcasts."""
    finite = np.minimum(knee, 1e300)
    return np.where(known > knee, finite * (np.maximum(known, 1e-300) / finite) ** ratio, known)


class _Fits:
    """A curve for each place of a knee, ratio and transfer: m of them, to n points."""

    def __init__(self, own: NDArray, others: NDArray, y: NDArray, count: NDArray, budget: float) -> None:
        self._y, self._bulk, self._count = y, y, count
        self._points = float(count.sum())
        n = len(y)
        late = np.arange(max(n - _LATEST, 1), n - 1)
        early = np.linspace(1, max(n - _LATEST, 1), max(_KNEES - len(late), 1)).round().astype(int)
        at = np.unique(np.concatenate([early, late]))
        at = at[at < n - 1]
        parts = [self._knees(own + transfer * others, at, transfer) for transfer in TRANSFERS]
        known, self.knee, self.ratio, self.transfer, self._log_prior = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        self._d = _bent(known, self.knee[:, None], self.ratio[:, None])  # [m, n]
        low, high = np.log(own[0] / 4), np.log(budget)
        self._middle = np.array([_EXPONENT_PRIOR[0], (low + high) / 2])
        self._precision = np.array([_EXPONENT_PRIOR[1], _SCALE_DEVIATION]) ** -2.0
        # Start from the best of a few.
        b = np.exp(_EXPONENT_PRIOR[0] + _EXPONENT_PRIOR[1] * np.linspace(-0.8, 1.5, _STARTS[0]))
        s = np.linspace(low + 0.7, high - 0.7, _STARTS[1])
        theta = np.stack([g.ravel() for g in np.meshgrid(np.log(b), s, indexing="ij")], axis=1)
        objective = np.stack([self._value(np.broadcast_to(t, (len(self.knee), 2)))[0] for t in theta])
        self.theta = theta[np.argmin(objective, axis=0)]
        self._damping = np.full(len(self.knee), 1e-2)
        self._now = self._value(self.theta)

    @staticmethod
    def _knees(known: NDArray, at: NDArray, transfer: float) -> tuple[NDArray, ...]:
        x = np.log(known)
        edges = np.concatenate([x[:1], (x[at][1:] + x[at][:-1]) / 2, x[-1:]])
        log_prior = np.log(np.maximum(HAZARD * np.diff(edges) / len(RATIOS), 1e-12)) - HAZARD * (x[at] - x[0])
        knee = np.concatenate([[np.inf], np.repeat(known[at], len(RATIOS))])
        return (
            np.broadcast_to(known, (len(knee), len(known))),
            knee,
            np.concatenate([[1.0], np.tile(RATIOS, len(at))]),
            np.full(len(knee), transfer),
            np.concatenate([[-HAZARD * (x[-1] - x[0])], np.repeat(log_prior, len(RATIOS))]),
        )

    def _variance(self, error: NDArray) -> float:
        return max(float(error.min()) / max(self._points - 4, 1.0), 1e-10)

    def _value(self, theta: NDArray) -> tuple[NDArray, NDArray, NDArray, NDArray, NDArray]:
        """Error with its penalty, error, A, E and the shape [m, n], with the best A and E for b and s."""
        b, s = np.exp(theta).T
        shape = np.exp(-b[:, None] * np.log1p(self._d / s[:, None]))
        share = self._count / self._count.sum()
        mean, middle = float(self._bulk @ share), shape @ share
        off, centred = self._bulk - mean, shape - middle[:, None]
        weighted = centred * self._count
        power = np.maximum(np.einsum("mn,mn->m", centred, weighted), 1e-300)
        size = np.maximum(weighted @ off / power, 0.0)
        error = (self._count * (off - size[:, None] * centred) ** 2).sum(axis=1)
        penalty = ((theta - self._middle) ** 2 * self._precision).sum(axis=1)
        return error + self._variance(error) * penalty, error, size, mean - size * middle, shape

    def _normal(self) -> tuple[NDArray, NDArray]:
        """Of each fit: the matrix [m, 2, 2] and right side [m, 2] of a step in log b, log s, with A and E free."""
        _, error, size, level, shape = self._now
        b, s = np.exp(self.theta).T
        z = self._d / s[:, None]
        along = -b[:, None] * shape
        slopes = [size[:, None] * along * np.log1p(z), -size[:, None] * along * z / (1 + z)]
        residual = self._bulk - level[:, None] - size[:, None] * shape
        share = self._count / self._count.sum()
        flat = [slope - (slope @ share)[:, None] for slope in slopes]
        centred = shape - (shape @ share)[:, None]
        power = np.maximum((centred**2) @ self._count, 1e-300)
        pure = np.stack([f - ((f * centred) @ self._count / power)[:, None] * centred for f in flat], axis=1)
        weighted = pure * self._count
        variance = self._variance(error)
        matrix = weighted @ pure.transpose(0, 2, 1) + variance * np.diag(self._precision)
        right = np.einsum("mkn,mn->mk", weighted, residual) - variance * self._precision * (
            self.theta - self._middle
        )
        return matrix, right

    def improve(self, iterations: int) -> None:
        """Damped least squares (Levenberg and Marquardt), in all fits at once."""
        self._now = self._value(self.theta)
        for _ in range(iterations):
            matrix, right = self._normal()
            damped = matrix + self._damping[:, None, None] * matrix * np.eye(2)
            step = np.clip(np.linalg.solve(damped, right[..., None])[..., 0], -1.5, 1.5)
            trial = self._value(self.theta + step)
            better = trial[0] < self._now[0]
            self.theta = np.where(better[:, None], self.theta + step, self.theta)
            self._damping = np.where(better, self._damping / 4, self._damping * 6).clip(1e-6, 1e6)
            self._now = tuple(  # type: ignore[assignment]
                np.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip(trial, self._now, strict=True)
            )

    def draw_in(self) -> None:
        """Draw outliers in towards the best curve, and count correlated points for fewer."""
        best = int(np.argmin(self._now[0]))
        _, _, size, level, shape = self._now
        curve = level[best] + size[best] * shape[best]
        scaled = (self._y - curve) * np.sqrt(self._count)
        noise = max(robust_scale(scaled), 1e-6)
        clipped = np.clip(scaled, -_OUTLIER * noise, _OUTLIER * noise)
        self._bulk = curve + clipped / np.sqrt(self._count)
        self._points = float(self._count.sum()) * effective_count(clipped) / len(clipped)

    def forecast(self, unit: float, last: float) -> Forecast:
        """The fits that are worth counting, each at five places of its b and s."""
        value, error, size, level, _ = self._now
        matrix, _ = self._normal()
        variance = self._variance(error)
        penalty = (value - error) / variance
        points = _TRUST * self._points
        log_weight = self._log_prior - max(points - 2, 1.0) / 2 * np.log(np.maximum(error, 1e-12))
        log_weight -= penalty / 2 + np.linalg.slogdet(matrix / variance)[1] / 2
        log_weight[size <= 0] = -np.inf
        log_weight[last + unit * level < 0] -= 10  # a loss that would fall below 0
        top = log_weight.max()
        chosen = (
            np.flatnonzero(log_weight > top + np.log(_LEAST_WEIGHT)) if np.isfinite(top) else np.zeros(0, int)
        )
        noise = unit * float(np.sqrt(variance))
        if not len(chosen):
            none = np.zeros(0)
            return Forecast(none, none, none, none, none, none, none, noise)
        # The unscented transform of two dimensions: the middle, and both ways along two axes.
        root = np.linalg.cholesky(np.linalg.inv(matrix[chosen] / variance) / _TRUST)
        axes = np.sqrt(3) * np.clip(root, -0.7, 0.7)
        offsets = np.stack([0 * axes[..., 0], axes[..., 0], -axes[..., 0], axes[..., 1], -axes[..., 1]])
        places, sizes = self.theta[chosen] + offsets, []
        kept, self._d = self._d, self._d[chosen]
        for place in places:
            sizes.append(unit * self._value(place)[2])
        self._d = kept
        weight = np.exp(log_weight[chosen] - top)
        weight = np.outer([1 / 3, *[1 / 6] * 4], weight / weight.sum()).ravel()
        b, s = np.exp(places.reshape(-1, 2)).T
        knee, ratio, transfer = (np.tile(c[chosen], 5) for c in (self.knee, self.ratio, self.transfer))
        return Forecast(weight, np.concatenate(sizes), b, s, knee, ratio, transfer, noise)
