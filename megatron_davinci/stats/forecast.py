"""What a loss will be after more tokens: offset power laws, with and without a knee, weighed by how well they fit.

With D what a model knows of a domain, `D = own + transfer * others` in tokens, its loss is `E + A (1 + d / s)^-b`: a
power law with an offset, as a domain's loss follows where something was learnt elsewhere (Hernandez et al., 2021,
arXiv 2102.01293). After a knee k, loss is linear in log-tokens, with the share r of the slope that it had at k (near
it, a broken power law: Caballero et al., 2023, arXiv 2210.14891).

A small model forgets: of two runs that have seen as much of a domain, the one that saw it lately has the lower loss.
So D is a geometric mean of what was seen in all, and of what would have been if every token had been like the latest
ones, `D^(1 - g) lately^g`. Where shares stay, both are the same, and nothing tells g; once they move, it shows.

Loss also falls as the learning rate is lowered, and not by what is learnt then: a term C (1 - rate / highest rate) is
fitted beside, as in the law of Tissue et al. (2024, arXiv 2408.11029), which has a sum over steps in that place.

Every place of a knee (and none), every r, every transfer and every g of a grid is tried with every b and s of a
lattice, E, A and C the best for each; the lattice then moves to where the probability is (adaptive quadrature: Naylor
and Smith, 1982, Applied Statistics 31). What is expected is the mean over all curves by their probability: what the
measurements do not tell is averaged, not guessed. That a knee may lie ahead is part of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
RECENCIES = np.array([0.0, 0.3])
"""g, the weight of what was seen lately; set, as `HORIZON`, on runs of `examples/curriculum_study`."""
HORIZON = 0.05
"""Of the budget: "lately" is an exponential mean over so many tokens."""
WAYS = np.stack(np.meshgrid(TRANSFERS, RECENCIES, indexing="ij"), axis=-1).reshape(-1, 2)
"""[t, 2] transfer and g of every curve that is tried; all as likely."""
_ANNEALING = 0.2  # standard deviation of C before anything is measured, of the range of the loss
_LEAST_LATELY = 0.02  # of all that was seen: nothing is forgotten for good
_FEW, _MANY = 40, 160  # points: to find where the probability is, and to weigh curves
_EXPONENT_PRIOR = (np.log(0.25), 0.8)  # a normal distribution of log b; loss curves lie near 0.05 to 0.5
_SCALE_DEVIATION = 2.0  # of log s, around the middle of the first evaluation and the budget
_LATTICE = np.stack(np.meshgrid(*[np.arange(-3.0, 4.0)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
_REACH = 0.8  # standard deviations between two places of the lattice
_BETWEEN = 0.35  # variance of what lies between two places, in squared distances
_ROUNDS = 2  # moves of the lattice over few points
_RULED_OUT = 1e-5  # probability of a knee below which it is not looked at again
_KEPT = 64  # curves that a forecast keeps, of those that forget and of the others
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
        recency: [k] g, the weight of what was seen lately.
        noise: Standard deviation of one evaluation around the best curve.
        seen: Tokens of the domain, of all others, and of it if all had been like the latest ones; at the end.
        horizon: Tokens that count as the latest ones.
    """

    weight: NDArray
    size: NDArray
    exponent: NDArray
    scale: NDArray
    knee: NDArray
    ratio: NDArray
    transfer: NDArray
    recency: NDArray
    noise: float
    seen: tuple[float, float, float]
    horizon: float

    @property
    def forgets(self) -> float:
        """Probability that what was not seen lately counts for less."""
        return float(self.weight[self.recency > 0].sum())

    def given(self, forgets: float) -> Forecast:
        """The same, where that probability is another: whether a model forgets, all of its domains tell together."""
        late = self.recency > 0
        weight = np.where(late, forgets, 1 - forgets) * self.weight
        weight /= np.maximum(np.where(late, self.forgets, 1 - self.forgets), 1e-300)
        return replace(self, weight=weight / max(float(weight.sum()), 1e-300))

    @property
    def kneed(self) -> float:
        """Probability that there was a knee."""
        return float(self.weight[np.isfinite(self.knee)].sum())

    def gains(self, own: NDArray, others: NDArray, hazard: float = HAZARD) -> NDArray:
        """How much lower loss is expected to be at some ends than at the first of them.

        Args:
            own: [n] tokens of the domain at each end, not falling, and none below what it has now.
            others: [n] tokens of all others there. Of the tokens between now and an end, each part is alike.
            hazard: Of a knee that lies ahead, an e-fold of what is known.

        Returns:
            [n] in the trajectory's units; 0 at first.
        """
        if not len(self.weight):
            return np.zeros(len(own))
        known, now = self._known(own, others), self._known(*(np.full(1, v) for v in self.seen[:2]))
        until = np.minimum(known, self.knee[:, None])
        z = until / self.scale[:, None]
        shape = np.exp(-self.exponent[:, None] * np.log1p(z))
        # After a knee the share `ratio` of the slope against log-tokens is left.
        slope = -self.exponent[:, None] * z / (1 + z) * shape
        shape = np.maximum(shape + self.ratio[:, None] * slope * np.log(known / until), 0.0)
        steps = (self.weight * self.size)[:, None] * (shape[:, :-1] - shape[:, 1:])
        # Growth that has not ended may yet do so.
        ahead = np.sqrt(known[:, 1:] * known[:, :-1]) / np.maximum(known[:, :1], now)
        survives = np.maximum(ahead, 1.0) ** -hazard
        left = survives + RATIOS.mean() * (1 - survives)
        steps = np.where(np.isinf(self.knee)[:, None], left * steps, steps)
        return np.concatenate([[0.0], np.cumsum(steps.sum(axis=0))])

    def _known(self, own: NDArray, others: NDArray) -> NDArray:
        """[k, n] D where so much has been seen."""
        before, of_others, lately = self.seen
        total, then = own + others, before + of_others
        new = np.maximum(total - then, 0.0)
        share = (own - before) / np.maximum(new, 1e-9)
        share += (lately / then - share) * np.exp(-new / self.horizon)
        return _known(own, others, share * total, self.transfer, self.recency)


def forecast(
    own: NDArray, others: NDArray, values: NDArray, budget: float, rates: NDArray | None = None
) -> Forecast:
    """Weigh curves for the held-out loss of a domain.

    Args:
        own: [n] tokens of the domain at each evaluation, not falling and above 0; repeated ones as what they are
            worth. At least 5.
        others: [n] tokens of all others.
        values: [n] loss.
        budget: Tokens of the whole run.
        rates: [n] learning rate at each evaluation; None where it did not change.
    """
    unit = max(float(np.ptp(values)), 1e-12)
    values, horizon = values / unit, HORIZON * budget
    lowered = np.zeros(len(values)) if rates is None else 1 - rates / np.maximum.accumulate(rates)
    # Where the probability is, a few points and knees tell. How it lies there takes every point and every knee: a
    # mean over both sides of a knee, or a knee looked for beside its place, passes for growth that goes on after it.
    points = condensed(own, others, values, _FEW, lowered)
    few = _Curves(*points, budget, np.arange(1, len(points[0]) - 1, 2), RATIOS.mean(keepdims=True))
    for _ in range(_ROUNDS):
        few.refine()
    points = condensed(own, others, values, _MANY, lowered)
    curves = _Curves(*points, budget, few.promising(points[0]), RATIOS)
    curves.place(*few.where())
    curves.draw_in()
    curves.place(*few.where())
    curves.refine()
    seen = float(own[-1]), float(others[-1]), float(lately(own, others, horizon)[-1])
    return curves.forecast(unit, seen, horizon)


def lately(own: NDArray, others: NDArray, horizon: float) -> NDArray:
    """What a domain would have, had all tokens been like the latest ones.

    Args:
        own: [n] tokens of the domain, not falling.
        others: [n] of all others; the sum rises.
        horizon: Tokens that an exponential mean of the domain's share goes over.

    Returns:
        [n] tokens; `own` where shares have never changed.
    """
    total = own + others
    new = np.diff(total, prepend=0.0)
    shares = np.diff(own, prepend=0.0) / np.maximum(new, 1e-9)
    kept, mean = np.exp(-new / horizon), shares[0]
    found = np.empty(len(own))
    for i, share in enumerate(shares):
        mean = found[i] = kept[i] * mean + (1 - kept[i]) * share
    return found * total


def _known(own: NDArray, others: NDArray, latest: NDArray, transfer: NDArray, recency: NDArray) -> NDArray:
    """[t, n] D: the mean of what was seen in all, and of what would have been by the latest tokens' shares."""
    transfer, recency = transfer[:, None], recency[:, None]
    known = np.maximum(own + transfer * others, 1e-9)
    by_latest = np.maximum(latest + transfer * (own + others - latest), _LEAST_LATELY * known)
    return np.asarray(known ** (1 - recency) * by_latest**recency)


def condensed(
    own: NDArray, others: NDArray, values: NDArray, most: int = _FEW, lowered: NDArray | None = None
) -> tuple[NDArray, NDArray, NDArray, NDArray, NDArray]:
    """A trajectory of few points: outliers are drawn in, and means taken where it was long ago.

    Args:
        own: [n] not falling.
        others: [n].
        values: [n].
        most: How many points may be left; the last third is kept as it is.
        lowered: [n] by what share of its highest the learning rate was lower; None for 0.

    Returns:
        `own`, `others`, `values` and `lowered`, each [at most `most`], and of how many points each is the mean.
    """
    n = len(values)
    lowered = np.zeros(n) if lowered is None else lowered
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
        return own, others, values, lowered, np.ones(n)
    latest = most // 3
    edges = np.linspace(0, n - latest, most - latest + 1).round().astype(int)
    starts = np.concatenate([edges[:-1], np.arange(n - latest, n)])
    count = np.diff(np.append(starts, n)).astype(float)
    own, others, values, lowered = (
        np.add.reduceat(v, starts) / count for v in (own, others, values, lowered)
    )
    return own, others, values, lowered, count


class _Curves:
    """Each curve of a grid against n points: t ways to know, q places of (log b, log s), c knees (the first is none).

    Up to its knee a curve is the one without, and after it a line in log-tokens. So the shapes without knees
    [t, q, n] give every other curve's fit by sums up to the knee and sums after it.

    Args:
        own: [n] tokens of the domain, not falling.
        others: [n] of all others.
        y: [n] loss.
        lowered: [n] by what share of its highest the learning rate was lower.
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
        lowered: NDArray,
        count: NDArray,
        budget: float,
        at: NDArray,
        ratios: NDArray,
    ) -> None:
        n = len(y)
        self._own = own
        self._count, self._all, self._y = count, float(count.sum()), y
        self.known = _known(own, others, lately(own, others, HORIZON * budget), *WAYS.T)  # [t, n]
        x = np.log(self.known)
        self._at = np.concatenate([[n - 1], np.repeat(at, len(ratios))])
        self.ratio = np.concatenate([[1.0], np.tile(ratios, len(at))])
        along = x[:, None, :] - x[:, self._at, None]  # [t, c, n]
        self._after = count * (np.arange(n) > self._at[:, None])
        self._along = along * self._after
        self._sums = (self._after.sum(-1), self._along.sum(-1), (self._along * along).sum(-1))
        # What the learning rate explains is taken out of all sums of products. C has a prior: as if it had been
        # measured to be 0, with the noise of this trajectory.
        self._lowered = lowered - lowered @ count / self._all
        noise = difference_noise(np.arange(n, dtype=float), y)
        self._lowered_power = max(float(self._lowered**2 @ count) + (noise / _ANNEALING) ** 2, 1e-12)
        self._sums_lowered = self._after @ self._lowered, self._along @ self._lowered
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
        self._taken = float(self._bulk * self._lowered @ self._count)
        self._total = float(self._bulk**2 @ self._count) - self._taken**2 / self._lowered_power
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
        after_lowered, along_lowered = self._sums_lowered
        taken = np.cumsum(weighted * self._lowered, -1)[..., at] + self.level * after_lowered
        taken += tail * along_lowered[:, None]
        power -= taken**2 / self._lowered_power
        cross -= taken * self._taken / self._lowered_power
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
        curve = self.size[t, q, c] * (shape - self._mean[t, q, c])
        annealed = ((self._bulk - curve) * self._lowered) @ self._count / self._lowered_power
        curve += self._height + annealed * self._lowered
        scaled = (self._y - curve) * np.sqrt(self._count)
        noise = max(robust_scale(scaled), 1e-6)
        clipped = np.clip(scaled, -_OUTLIER * noise, _OUTLIER * noise)
        self._set(curve + clipped / np.sqrt(self._count), self._all * effective_count(clipped) / len(clipped))

    def forecast(self, unit: float, seen: tuple[float, float, float], horizon: float) -> Forecast:
        """Of all curves, some with equal shares of the probability."""
        noise = unit * float(np.sqrt(self.error.min() / max(self._points - 4, 1.0)))
        chosen, weight = [np.zeros(0, np.int64)], [np.zeros(0)]
        for late in (WAYS[:, 1] > 0, WAYS[:, 1] == 0):
            # Systematic sampling: each curve as often as its probability says, to within one.
            cumulative = np.cumsum(np.where(late[:, None, None], self.weight, 0.0))
            if not cumulative[-1] > 0:
                continue
            wanted = (np.arange(_KEPT) + 0.5) / _KEPT * cumulative[-1]
            found, times = np.unique(np.searchsorted(cumulative, wanted), return_counts=True)
            chosen.append(found)
            weight.append(times / _KEPT * cumulative[-1])
        t, q, c = np.unravel_index(np.concatenate(chosen), self.weight.shape)
        b, s = np.exp(self.theta[q]).T
        knee = np.where(c > 0, self.known[t, self._at[c]], np.inf)
        size = unit * self.size[t, q, c]
        transfer, recency = WAYS[t].T
        ratio = self.ratio[c]
        return Forecast(
            np.concatenate(weight), size, b, s, knee, ratio, transfer, recency, noise, seen, horizon
        )
