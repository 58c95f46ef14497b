"""Scaling laws over a ladder of sizes: L(N) = E + A / N^a, or L(N, D) = E + A / N^a + B / D^b, and how sure they are.

The law itself is fitted as by Hoffmann et al. (2022, arXiv 2203.15556, appendix D.3): least Huber loss (delta 1e-3)
of the difference of logarithms, from several starts, the best of which counts.

How sure it is follows from a grid of exponents. For every exponent E, A and B are those of weighted least squares;
each is weighed by its probability with coefficients and noise integrated out, under flat priors of the loss at the
largest size and of the fall over the sizes that were run, and a wide one of the exponents (log-normal, around 0.3).
Laws are drawn from it: intervals are their quantiles, so that those of a prediction know that E and a trade off
against each other, which is most of the uncertainty far out. Noise is taken as relative and independent between
runs; outliers count for less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_davinci.errors import DataError
from megatron_davinci.stats.noise import robust_scale

LEAST_SIZES = 4
"""Of L(N): it has three coefficients, and one size more to contradict them."""
LEAST_PAIRS = 6
"""Different (N, D) of L(N, D), which has five coefficients; with three different values of each."""
_HUBER = 1e-3
_STARTS = (0.08, 0.2, 0.4, 0.8)  # exponents
_TRIED = 3  # of the starts: those that are nearest by least squares
_PRIOR = (np.log(0.3), 0.8)  # of an exponent's logarithm; published ones lie between 0.05 and 0.6
_GRID = (0.02, 2.0)
_NODES = {1: 120, 2: 32}  # by the number of exponents
_TURNS = 6  # of the grid, each finer than the one before
_TOLD_BY = 12  # nodes of an exponent that have weight: fewer are too coarse for quantiles
_OUTLIER = 3.0  # standard deviations
_LEAST_FALLS = 0.05  # probability that losses fall with size, below which there is no law
_DRAWS = 4000
_TOGETHER = 0.97  # a correlation of log N and log D from which on their parts cannot be told apart


@dataclass(frozen=True)
class Interval:
    """A value with an interval.

    Attributes:
        value: The value.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law.

    Attributes:
        floor: E, nats per token.
        coefficient: A, with sizes in parameters.
        exponent: a.
        data_coefficient: B, with tokens; 0 for L(N).
        data_exponent: b; 0 for L(N).
        noise: Relative standard deviation of one run around the law.
        draws: [k, 5] laws worth as much, in the order E, A, a, B, b.
        confidence: Of intervals.
    """

    floor: float
    coefficient: float
    exponent: float
    data_coefficient: float
    data_exponent: float
    noise: float
    draws: NDArray
    confidence: float

    @property
    def of_data(self) -> bool:
        """Whether it is L(N, D)."""
        return self.data_coefficient > 0

    def interval(self, name: str) -> Interval:
        """A coefficient (`floor`, `coefficient`, `exponent`, `data_coefficient`, `data_exponent`)."""
        column = _NAMES.index(name)
        low, high = self._quantiles(self.draws[:, column])
        return Interval(float(getattr(self, name)), float(low), float(high))

    def loss(self, size: ArrayLike, tokens: ArrayLike | None = None) -> NDArray:
        """[...] by the law, for [...] parameters and, of L(N, D), [...] tokens."""
        point = np.array([[getattr(self, name) for name in _NAMES]])
        return np.asarray(_losses(point, *self._given(size, tokens))[0])

    def predict(self, size: float, tokens: float | None = None) -> Interval:
        """What runs of a size come to in the mean.

        Args:
            size: Parameters.
            tokens: Of L(N, D); it is an error to leave them out there.

        Raises:
            ValueError: Tokens are missing.
        """
        drawn = _losses(self.draws, *self._given(size, tokens))
        low, high = self._quantiles(drawn)
        return Interval(float(self.loss(size, tokens)), float(low), float(high))

    def _given(self, size: ArrayLike, tokens: ArrayLike | None) -> tuple[NDArray, NDArray]:
        if self.of_data and tokens is None:
            raise ValueError("a law of sizes and tokens needs both")
        n = np.asarray(size, np.float64)
        return n, np.ones_like(n) if tokens is None else np.asarray(tokens, np.float64)

    def _quantiles(self, values: NDArray) -> NDArray:
        half = (1 - self.confidence) / 2
        return np.asarray(np.quantile(values, [half, 1 - half], axis=0))


_NAMES = ("floor", "coefficient", "exponent", "data_coefficient", "data_exponent")


def _losses(laws: NDArray, n: NDArray, d: NDArray) -> NDArray:
    """[k, ...] of [k, 5] laws at [...] sizes and tokens."""
    e, a, x, b, y = (column.reshape(-1, *[1] * n.ndim) for column in laws.T)
    return np.asarray(e + a * n**-x + b * d**-y)


def fit_scaling_law(
    sizes: ArrayLike,
    losses: ArrayLike,
    tokens: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    what: str = "scaling law",
) -> ScalingLaw:
    """Fit a law to runs.

    Args:
        sizes: [n] parameters of each run.
        losses: [n] at its end, nats per token. Several runs of one size are several points.
        tokens: [n] that each was trained on, for L(N, D); None for L(N).
        confidence: Of the intervals.
        seed: Of the draws.
        what: Names the law in errors.

    Raises:
        DataError: Fewer sizes than the law has coefficients, sizes and tokens that go together, values that no loss
            or size has, or losses that do not fall with size.
    """
    n, y = np.asarray(sizes, np.float64), np.asarray(losses, np.float64)
    d = None if tokens is None else np.asarray(tokens, np.float64)
    _refuse(n, y, d, what)
    point = _huber_fit(n, y, d)
    columns = [n] if d is None else [n, d]
    scaled = np.log(_losses(point[None], n, np.ones_like(n) if d is None else d)[0]) - np.log(y)
    scale = max(robust_scale(scaled), 1e-9)
    weight = np.minimum(1.0, _OUTLIER * scale / np.maximum(np.abs(scaled), 1e-12)) / y**2
    draws, noise = _draws(columns, y, weight, np.random.default_rng(seed), what)
    e, a, x, b, y_exponent = (float(value) for value in point)
    return ScalingLaw(e, a, x, b, y_exponent, noise, draws, confidence)


def _refuse(n: NDArray, y: NDArray, d: NDArray | None, what: str) -> None:
    lengths = {len(n), len(y)} | ({len(d)} if d is not None else set())
    if len(lengths) != 1:
        raise DataError("A scaling law needs a size for each loss.", where=what, found=f"{sorted(lengths)}")
    bad = [v for a in (n, y, d) if a is not None for v in a if not np.isfinite(v) or v <= 0]
    if bad:
        raise DataError(
            "A scaling law needs sizes, tokens and losses that are finite and above 0.",
            where=what,
            found=f"{bad[0]}",
        )
    distinct = len(np.unique(n))
    if d is None:
        if distinct < LEAST_SIZES:
            raise DataError(
                "Too few sizes for a scaling law.",
                where=what,
                found=f"{distinct}",
                expected=f"{LEAST_SIZES} or more: the law has three coefficients",
                do="add sizes to the ladder",
            )
        return
    pairs = len(np.unique(np.stack([n, d]), axis=1).T)
    if pairs < LEAST_PAIRS or distinct < 3 or len(np.unique(d)) < 3:
        raise DataError(
            "Too few sizes and budgets for a law of both.",
            where=what,
            found=f"{distinct} sizes, {len(np.unique(d))} budgets, {pairs} pairs of them",
            expected=f"3 or more of each, {LEAST_PAIRS} or more pairs: the law has five coefficients",
            do="add sizes and budgets, or fit L(N)",
        )
    together = float(np.corrcoef(np.log(n), np.log(d))[0, 1])
    if abs(together) > _TOGETHER:
        raise DataError(
            "Sizes and tokens grow together, so their parts in the loss cannot be told apart.",
            where=what,
            found=f"a correlation of {together:.3f} between their logarithms",
            expected=f"at most {_TOGETHER}",
            do="run some sizes with other budgets, or fit L(N) along this ladder",
        )


def _huber_fit(n: NDArray, y: NDArray, d: NDArray | None) -> NDArray:
    """[5] the law of least Huber loss of log differences."""
    from scipy.optimize import least_squares, nnls
    from scipy.special import softmax

    logs = [np.log(n)] if d is None else [np.log(n), np.log(d)]
    middles = [float(one.mean()) for one in logs]
    logs = [one - middle for one, middle in zip(logs, middles, strict=True)]  # better conditioned
    target, count = np.log(y), len(logs)

    def terms(theta: NDArray) -> NDArray:
        return np.stack([np.full(len(y), theta[0])] + [
            theta[1 + 2 * i] - np.exp(theta[2 + 2 * i]) * logs[i] for i in range(count)
        ])  # fmt: skip

    def residuals(theta: NDArray) -> NDArray:
        return np.asarray(np.logaddexp.reduce(terms(theta)) - target)

    def jacobian(theta: NDArray) -> NDArray:
        part = softmax(terms(theta), axis=0)
        found = [part[0]]
        for i in range(count):
            found += [part[1 + i], -part[1 + i] * np.exp(theta[2 + 2 * i]) * logs[i]]
        return np.stack(found, axis=1)

    starts = []
    low = np.array([-12.0, *[-12.0, np.log(1e-3)] * count])
    high = np.array([np.log(y.max()), *[12.0, np.log(3.0)] * count])
    for exponents in np.array(np.meshgrid(*[_STARTS] * count)).reshape(count, -1).T:
        design = np.stack(
            [np.ones_like(y), *(np.exp(-x * one) for x, one in zip(exponents, logs, strict=True))]
        )
        values, rest = nnls((design / y).T, np.ones_like(y))
        logged = np.log(np.maximum(values, 1e-4))
        start = [logged[0]]
        for i in range(count):
            start += [logged[1 + i], np.log(exponents[i])]
        starts.append((rest, np.clip(start, low + 1e-6, high - 1e-6)))
    starts.sort(key=lambda one: one[0])
    fits = [
        least_squares(residuals, begin, jacobian, (low, high), loss="huber", f_scale=_HUBER, max_nfev=100)
        for _, begin in starts[:_TRIED]
    ]
    best = min(fits, key=lambda one: one.cost)
    point = np.zeros(5)
    point[0] = np.exp(best.x[0])
    for i in range(count):
        exponent = np.exp(best.x[2 + 2 * i])
        point[1 + 2 * i], point[2 + 2 * i] = np.exp(best.x[1 + 2 * i] + exponent * middles[i]), exponent
    return point


def _draws(
    columns: list[NDArray], y: NDArray, weight: NDArray, rng: np.random.Generator, what: str
) -> tuple[NDArray, float]:
    """[k, 5] laws by their probability, and the relative noise."""
    count, log_sizes = len(columns), [np.log(one) for one in columns]
    axes = [np.linspace(np.log(_GRID[0]), np.log(_GRID[1]), _NODES[count])] * count
    for turn in range(_TURNS):
        nodes = np.exp(np.array(np.meshgrid(*axes, indexing="ij")).reshape(count, -1).T)  # [g, count]
        inverse, best, error, log_weight, spans = _weighed(log_sizes, y, weight, nodes)
        # A good ladder's exponents lie within one cell of a coarse grid: a fine one where the weight is, and a finer
        # one in that while the weight still lies on a few of its nodes.
        there = np.log(nodes[log_weight > log_weight.max() - 14])
        if turn and min(len(np.unique(one)) for one in there.T) >= _TOLD_BY:
            break
        steps = [axis[1] - axis[0] for axis in axes]
        axes = [
            np.linspace(one.min() - step, one.max() + step, _NODES[count])
            for one, step in zip(there.T, steps, strict=True)
        ]
    free = len(y) - 1 - count
    share = np.exp(log_weight - log_weight.max())
    share /= share.sum()
    # Nearly every draw may have to be refused where the floor would lie below 0, so there are many.
    chosen = rng.choice(len(share), 10 * _DRAWS, p=share)
    deviation = np.sqrt(np.maximum(error[chosen], 1e-18) / rng.chisquare(free, len(chosen)))
    root = np.linalg.cholesky(inverse)
    values = best[chosen] + deviation[:, None] * np.einsum(
        "kpq,kq->kp", root[chosen], rng.standard_normal((len(chosen), 1 + count))
    )
    laws = np.zeros((len(chosen), 5))
    laws[:, 0] = values[:, 0]
    for i in range(count):
        exponent, fall = nodes[chosen, i], values[:, 1 + i]
        at_largest = fall / spans[chosen, i]
        laws[:, 0] -= at_largest
        laws[:, 1 + 2 * i] = at_largest * np.exp(exponent * log_sizes[i].max())
        laws[:, 2 + 2 * i] = exponent
    falls = (values[:, 1:] > 0).all(axis=1)
    possible = falls & (laws[:, 0] >= 0)
    if falls.mean() < _LEAST_FALLS or possible.mean() < 0.005:
        raise DataError(
            "The losses do not fall with size as a scaling law's would.",
            where=what,
            found=f"{100 * possible.mean():.1f}% of the laws that fit have a floor of 0 or more and fall",
            do="look at the runs: a learning rate or batch size that fits one size only does this",
        )
    noise = float(np.sqrt(error.min() / max(free - count, 1)))
    return laws[possible][:_DRAWS], noise


def _weighed(
    log_sizes: list[NDArray], y: NDArray, weight: NDArray, nodes: NDArray
) -> tuple[NDArray, NDArray, NDArray, NDArray, NDArray]:
    """For each [g, count] of exponents: covariance in units of the noise, coefficients, error, log weight, spans."""
    # Columns that are 0 at the largest and 1 at the smallest: coefficients are the loss there, and falls.
    largest, smallest = (np.array([of(one) for one in log_sizes]) for of in (np.max, np.min))
    spans = np.expm1(nodes * (largest - smallest))  # (N_min^-a - N_max^-a) N_max^a
    parts = [
        np.expm1(nodes[:, i, None] * (largest[i] - one)) / spans[:, i, None]
        for i, one in enumerate(log_sizes)
    ]
    design = np.stack([np.ones_like(parts[0]), *parts], axis=2)  # [g, n, 1 + count]
    weighted = design * weight[None, :, None]
    matrix = weighted.transpose(0, 2, 1) @ design
    inverse = np.linalg.inv(matrix)
    best = np.einsum("gpq,gq->gp", inverse, np.einsum("gnq,n->gq", weighted, y))
    error = ((y - (design @ best[:, :, None])[:, :, 0]) ** 2) @ weight
    free = len(y) - design.shape[2]
    log_weight = -free / 2 * np.log(np.maximum(error, 1e-18)) - np.linalg.slogdet(matrix)[1] / 2
    log_weight -= (((np.log(nodes) - _PRIOR[0]) / _PRIOR[1]) ** 2).sum(axis=1) / 2
    return inverse, best, error, log_weight, spans
