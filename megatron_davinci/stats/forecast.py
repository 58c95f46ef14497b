"""What a loss will be after more tokens: offset power laws, with and without a knee, weighed by how well they fit.

With D what a model knows of a domain, `D = own + transfer * others` in tokens, its loss is `E + A (1 + d / s)^-b`: a
power law with an offset, as a domain's loss follows where something was learnt elsewhere (Hernandez et al., 2021,
arXiv 2102.01293). After a knee k, loss is linear in log-tokens, with the share r of the slope that it had at k (near
it, a broken power law: Caballero et al., 2023, arXiv 2210.14891).

Every place of a knee (and none), every r and every transfer of a grid is tried with every b and s of a lattice, E and
A the best for each; the lattice then moves to where the probability is (adaptive quadrature: Naylor and Smith, 1982,
Applied Statistics 31). What is expected is the mean over all curves by their probability: what the measurements do
not tell is averaged, not guessed. That a knee may lie ahead is part of it.
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
TRANSFERS = np.array([0.0, 0.015, 0.03])
"""What a token of another domain is worth; all as likely. The ends alone would not do: of a domain that is given
little and learns much from others, noise then throws what lies between them to one or the other."""
_FEW, _MANY = 40, 160  # points: to find where the probability is, and to weigh curves
_EXPONENT_PRIOR = (np.log(0.25), 0.8)  # a normal distribution of log b; loss curves lie near 0.05 to 0.5
_SCALE_DEVIATION = 2.0  # of log s, around the middle of the first evaluation and the budget
_LATTICE = np.stack(np.meshgrid(*[np.arange(-3.0, 4.0)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
_REACH = 0.8  # standard deviations between two places of the lattice
_BETWEEN = 0.35  # variance of what lies between two places, in squared distances
_ROUNDS = 2  # moves of the lattice over few points
_RULED_OUT = 1e-5  # probability of a knee below which it is not looked at again
_KEPT = 128  # curves that a forecast keeps, by equal shares of the probability
_OUTLIER = 2.5  # standard deviations


@dataclass(frozen=True)
class Forecast:
    """Curves worth counting, and where the trajectory has come to.

    Attributes:
        weight: [k] probability; sums to 1, or k is 0 where no curve that falls fits.
        size: [k] A, in the trajectory's units.
        exponent: [k] b.
        scale: [k] s, in tokens.
        knee: [k] k, in tokens; infinite where there is none yet.
        ratio: [k] r, the share of the slope against log-tokens that is left after the knee.
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
        until = np.minimum(known, self.knee[:, None])
        z = until / self.scale[:, None]
        shape = np.exp(-self.exponent[:, None] * np.log1p(z))
        # After a knee the share `ratio` of the slope against log-tokens is left.
        slope = -self.exponent[:, None] * z / (1 + z) * shape
        shape = np.maximum(shape + self.ratio[:, None] * slope * np.log(known / until), 0.0)
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
    unit = max(float(np.ptp(values)), 1e-12)
    values = values / unit
    # Where the probability is, a few points and knees tell. How it lies there takes every point and every knee: a
    # mean over both sides of a knee, or a knee looked for beside its place, passes for growth that goes on after it.
    points = condensed(own, others, values, _FEW)
    few = _Curves(*points, budget, np.arange(1, len(points[0]) - 1, 2), RATIOS.mean(keepdims=True))
    for _ in range(_ROUNDS):
        few.refine()
    points = condensed(own, others, values, _MANY)
    curves = _Curves(*points, budget, few.promising(points[0]), RATIOS)
    curves.place(*few.where())
    curves.draw_in()
    curves.place(*few.where())
    curves.refine()
    return curves.forecast(unit)


def condensed(
    own: NDArray, others: NDArray, values: NDArray, most: int = _FEW
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """A trajectory of few points: outliers are drawn in, and means taken where it was long ago.

    Args:
        own: [n] not falling.
        others: [n].
        values: [n].
        most: How many points may be left; the last third is kept as it is.

    Returns:
        Each in [at most `most`], and of how many points each is the mean.
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
    if n <= most:
        return own, others, values, np.ones(n)
    latest = most // 3
    edges = np.linspace(0, n - latest, most - latest + 1).round().astype(int)
    starts = np.concatenate([edges[:-1], np.arange(n - latest, n)])
    count = np.diff(np.append(starts, n)).astype(float)
    own, others, values = (np.add.reduceat(v, starts) / count for v in (own, others, values))
    return own, others, values, count


class _Curves:
    """Every curve of a grid against n points: t transfers, q places of (log b, log s), c knees (the first is none).

    Up to its knee a curve is the one without, and after it a line in log-tokens. So the shapes without knees
    [t, q, n] give every other curve's fit by sums up to the knee and sums after it.

    Args:
        own: [n] tokens of the domain, not falling.
        others: [n] of all others.
        y: [n] loss.
        count: [n] how many evaluations each is the mean of.
        budget: Tokens of the whole run.
        at: [] points that a knee may be at, rising; neither the first nor the last.
        ratios: [] r, after a knee.
    """

    def __init__(
        self,
        own: NDArray,
        others: NDArray,
        y: NDArray,
        count: NDArray,
        budget: float,
        at: NDArray,
        ratios: NDArray,
    ) -> None:
        n = len(y)
        self._own = own
        self._count, self._all, self._y = count, float(count.sum()), y
        self.known = own + TRANSFERS[:, None] * others  # [t, n]
        x = np.log(self.known)
        self._at = np.concatenate([[n - 1], np.repeat(at, len(ratios))])
        self.ratio = np.concatenate([[1.0], np.tile(ratios, len(at))])
        along = x[:, None, :] - x[:, self._at, None]  # [t, c, n]
        self._after = count * (np.arange(n) > self._at[:, None])
        self._along = along * self._after
        self._sums = (self._after.sum(-1), self._along.sum(-1), (self._along * along).sum(-1))
        # Each knee stands for all up to half the way to the points beside it, or to the knees where those are fewer.
        beside = np.arange(n) if len(at) < 2 or np.diff(at).min() == 1 else np.union1d([0, n - 1], at)
        middles = (x[:, beside][:, 1:] + x[:, beside][:, :-1]) / 2
        edges = np.concatenate([x[:, :1], middles, x[:, -1:]], axis=1)
        widths = np.diff(edges)[:, np.searchsorted(beside, at)]
        logs = np.log(np.maximum(HAZARD * widths / len(ratios), 1e-12))
        logs -= HAZARD * (x[:, at] - x[:, :1])
        none = -HAZARD * (x[:, -1:] - x[:, :1])
        self._log_prior = np.concatenate([none, np.repeat(logs, len(ratios), axis=1)], axis=1)  # [t, c]
        low, high = np.log(own[0] / 4), np.log(budget)
        self._middle = np.array([_EXPONENT_PRIOR[0], (low + high) / 2])
        self._deviation = np.array([_EXPONENT_PRIOR[1], _SCALE_DEVIATION])
        self._set(y, self._all)
        # The first places span what is likely before anything is measured.
        self._spread = np.diag(self._deviation * np.array([2.0, 1.6]) / np.abs(_LATTICE).max())
        self.place(self._middle, self._spread)

    def _set(self, y: NDArray, points: float) -> None:
        """Take [n] values that are worth so many points."""
        self._height = float(y @ self._count) / self._all
        self._bulk = y - self._height
        self._points = points
        self._total = float(self._bulk**2 @ self._count)
        self._sums_y = self._after @ self._bulk, self._along @ self._bulk

    def place(self, middle: NDArray, spread: NDArray) -> None:
        """Weigh all curves with (log b, log s) at `middle + spread @ lattice`."""
        self._spread, self.theta = spread, middle + _LATTICE @ spread.T
        b, s = np.exp(self.theta).T
        z = self.known[:, None] / s[:, None]
        self._shape = np.exp(-b[:, None] * np.log1p(z))  # [t, q, n]
        weighted = self._shape * self._count
        at = self._at
        z, self.level = z[..., at], self._shape[..., at]
        self.slope = -b[:, None] * z / (1 + z) * self.level  # of the shape, by log-tokens, at the knee
        after, along, squares = self._sums
        after_y, along_y = self._sums_y
        tail = self.ratio * self.slope
        along, squares, along_y = along[:, None], squares[:, None], along_y[:, None]
        self._mean = np.cumsum(weighted, -1)[..., at] + self.level * after + tail * along
        self._mean /= self._all
        power = np.cumsum(weighted * self._shape, -1)[..., at] + self.level**2 * after
        power += tail * (2 * self.level * along + tail * squares) - self._all * self._mean**2
        cross = np.cumsum(weighted * self._bulk, -1)[..., at] + self.level * after_y + tail * along_y
        self.size = np.maximum(cross, 0) / np.maximum(power, 1e-12)
        self.error = np.maximum(self._total - self.size * cross, 1e-12 * self._total + 1e-300)
        free = max(self._points - 2, 1.0)
        log_weight = self._log_prior[:, None] - free / 2 * np.log(self.error)
        log_weight -= (((self.theta - self._middle) / self._deviation) ** 2).sum(-1)[:, None] / 2
        log_weight[self.size <= 0] = -np.inf
        log_weight[self._height < self.size * self._mean] -= 10  # a loss that would fall below 0
        top = log_weight.max()
        weight = np.exp(log_weight - top) if np.isfinite(top) else np.zeros_like(log_weight)
        self.weight = weight / max(weight.sum(), 1e-300)

    def where(self) -> tuple[NDArray, NDArray]:
        """A lattice over where the probability is (adaptive quadrature: Naylor and Smith, 1982)."""
        of_place = self.weight.sum(axis=(0, 2))
        if not of_place.any():
            return self._middle, self._spread
        middle = of_place @ self.theta
        off = self.theta - middle
        # Between two places of the lattice nothing is known, so their distance is uncertainty too.
        covariance = (off * of_place[:, None]).T @ off + _BETWEEN * self._spread @ self._spread.T
        return middle, np.linalg.cholesky(covariance) * _REACH

    def promising(self, own: NDArray) -> NDArray:
        """Which of finer points a knee may be at: those near knees that are not ruled out, and the last."""
        n, last = len(own), len(self._own) - 1
        likely = self._at[1:][self.weight.sum(axis=(0, 1))[1:] > _RULED_OUT]
        low, high = (self._own[np.clip(likely + step, 0, last)] for step in (-3, 3))
        near = ((own >= low[:, None]) & (own <= high[:, None])).any(axis=0)
        near[-8:] = True
        return np.flatnonzero(near[1 : n - 1]) + 1

    def refine(self) -> None:
        """Move the lattice there."""
        self.place(*self.where())

    def draw_in(self) -> None:
        """Draw outliers in towards the best curve, and count correlated points for fewer."""
        t, q, c = np.unravel_index(int(np.argmax(self.weight)), self.weight.shape)
        shape = self._shape[t, q].copy()
        late = self._after[c] > 0
        ahead = np.log(self.known[t, late] / self.known[t, self._at[c]])
        shape[late] = self.level[t, q, c] + self.ratio[c] * self.slope[t, q, c] * ahead
        curve = self._height + self.size[t, q, c] * (shape - self._mean[t, q, c])
        scaled = (self._y - curve) * np.sqrt(self._count)
        noise = max(robust_scale(scaled), 1e-6)
        clipped = np.clip(scaled, -_OUTLIER * noise, _OUTLIER * noise)
        self._set(curve + clipped / np.sqrt(self._count), self._all * effective_count(clipped) / len(clipped))

    def forecast(self, unit: float) -> Forecast:
        """Of all curves, some with equal shares of the probability."""
        noise = unit * float(np.sqrt(self.error.min() / max(self._points - 4, 1.0)))
        cumulative = np.cumsum(self.weight.ravel())
        if not cumulative[-1] > 0:
            none = np.zeros(0)
            return Forecast(none, none, none, none, none, none, none, noise)
        # Systematic sampling: each curve as often as its probability says, to within one.
        wanted = (np.arange(_KEPT) + 0.5) / _KEPT * cumulative[-1]
        chosen, times = np.unique(np.searchsorted(cumulative, wanted), return_counts=True)
        t, q, c = np.unravel_index(chosen, self.weight.shape)
        b, s = np.exp(self.theta[q]).T
        knee = np.where(c > 0, self.known[t, self._at[c]], np.inf)
        size = unit * self.size[t, q, c]
        return Forecast(times / _KEPT, size, b, s, knee, self.ratio[c], TRANSFERS[t], noise)
