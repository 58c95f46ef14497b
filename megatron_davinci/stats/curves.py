"""Curves that trajectories follow, weighed on a grid: a power law, one with a step or a knee, two limbs that grow.

With x the logarithm of tokens, growth is `g_c(x) = (1 - exp(-c (x - x0))) / c`: a power law of tokens with exponent
-c and a free asymptote, a straight line in log-tokens for c = 0, and growth that accelerates for c < 0. A knee at k
bends x
itself: up to k growth is that of x, after it `ratio` of that of x is left. A curve is `level + size * shape`, and
every shape of the grid is tried, so that no fit can end in a local optimum and what is not known is averaged over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EXPONENTS = np.array([-0.7, -0.4, -0.2, 0.0, 0.1, 0.2, 0.3, 0.42, 0.6, 0.9, 1.4])
"""Of growth. Loss curves lie near 0.03 to 0.5; benchmark scores can accelerate."""
WIDTHS = np.array([0.02, 0.07, 0.13, 0.22])
"""Of a knee's bend, in log-tokens: 80% of it lies within 4.4 widths."""
KNEE_RATIOS = np.array([-0.08, 0.0, 0.07, 0.14, 0.23, 0.32])
"""What is left of growth after a knee."""
OTHER_RATIOS = np.array([0.5, 0.7, 1.4, 2.0, 4.0])
"""What is left of growth after a change that is no knee."""
FAMILIES = ("power", "step", "change", "knee")
POSITIONS = 64
"""Where a knee is looked for: 64 places tell its position to a few percent."""
_EDGE = 3  # points that a limb needs
_EXPONENT_PRIOR = (0.05, 0.25)  # mean and deviation of a normal distribution
_WIDTH_PRIOR = 0.1  # mean of an exponential distribution


def growth(x: NDArray, exponent: NDArray | float, origin: float) -> NDArray:
    """`g_c`: the growth from `origin` to `x` in log-tokens, with slope 1 at the origin; broadcasts."""
    c = np.asarray(exponent, np.float64)
    z = x - origin
    safe = np.where(np.abs(c) < 1e-9, 1.0, c)
    return np.where(np.abs(c) < 1e-9, z, -np.expm1(-safe * z) / safe)


def bent(x: NDArray, knee: NDArray | float, width: NDArray | float) -> NDArray:
    """`x` up to the knee and the knee's position after it, with a bend of `width`; broadcasts."""
    return knee - width * np.logaddexp(0.0, (knee - x) / width)


@dataclass(frozen=True)
class Posterior:
    """What a trajectory says of the shapes of a grid.

    Attributes:
        weight: [m] probability of each shape.
        level: [m] the best level with it.
        size: [m] the best size with it; negative where the trajectory falls.
        size_error: [m] standard error of `size`.
        error: [m] sum of squared residuals.
        jump: [m] height of the step; 0 where the shape has none.
    """

    weight: NDArray
    level: NDArray
    size: NDArray
    size_error: NDArray
    error: NDArray
    jump: NDArray


class CurveGrid:
    """Shapes for trajectories that were measured at the same positions.

    Args:
        x: [n] log-tokens, rising; at least 7.
        positions: How many places a knee is looked for at; between them its position is interpolated.

    Attributes:
        family: [m] number in `FAMILIES` of each shape.
        at: [m] position of the knee, change or step; NaN for a power law.
        ratio: [m] growth that is left after it; 1 where there is none.
        end_slope: [m] slope of the shape at the last position.
        mean_slope: [m] mean slope of its growth: up to the knee, where there is one, else over all positions.
    """

    def __init__(self, x: NDArray, positions: int = POSITIONS) -> None:
        self._x, self._origin = x, float(np.median(x))
        low, high = x[_EDGE - 1], x[-_EDGE]
        places = np.linspace(low, high, positions)
        between = ((x[1:] + x[:-1]) / 2)[1:-1]
        one = np.array([1.0])
        self._grids = [
            (np.array([np.inf]), one, one),
            (between, one, one),
            (places, WIDTHS[[0, 2]], OTHER_RATIOS),
            (places, WIDTHS, KNEE_RATIOS),
        ]
        parts = [self._limbs(name, *grid) for name, grid in zip(FAMILIES, self._grids, strict=True)]
        family, exponent, at, width, ratio = (np.concatenate(column) for column in zip(*parts, strict=True))
        self.family, self.ratio = family.astype(int), ratio
        self._exponent, self._width = exponent, width
        self.at = np.where(self.family == 0, np.nan, at)
        self._steps = np.flatnonzero(self.family == 1)
        self._log_prior = self._prior()
        self._shapes = self.shapes(x)
        self._first = self._shapes.mean(axis=1)
        self._centred = self._shapes - self._first[:, None]
        self._power = np.einsum("mn,mn->m", self._centred, self._centred)
        # A step's part that growth does not explain already.
        stepped = (x > self.at[self._steps, None]).astype(float)
        self._step_means = stepped.mean(axis=1)
        self._stepped = stepped - self._step_means[:, None]
        along = self._centred[self._steps]
        self._overlap = np.einsum("mn,mn->m", self._stepped, along) / self._power[self._steps]
        self._pure = self._stepped - self._overlap[:, None] * along
        self._pure_power = np.einsum("mn,mn->m", self._pure, self._pure)
        tail = self.shapes(np.array([x[-1] - 1e-4, x[-1] + 1e-4]))
        self.end_slope = (tail[:, 1] - tail[:, 0]) / 2e-4
        end = np.where(self.family == 3, self.at, x[-1])
        begin, arrived = growth(x[:1], exponent, self._origin), growth(end, exponent, self._origin)
        self.mean_slope = (arrived - begin) / (end - x[0])
        changed = self.family == 2
        self.mean_slope[changed] = (self._shapes[changed, -1] - self._shapes[changed, 0]) / (x[-1] - x[0])

    def shapes(self, x: NDArray) -> NDArray:
        """[m, len(x)] growth of each shape at positions in log-tokens; steps left out."""
        found = np.concatenate([self._grown(x, *grid) for grid in self._grids])
        return found.reshape(-1, len(x))

    def _grown(self, x: NDArray, at: NDArray, widths: NDArray, ratios: NDArray) -> NDArray:
        """[exponents * at * widths * ratios, len(x)]; what ratios share is computed once."""
        whole = growth(x, EXPONENTS[:, None, None, None, None], self._origin)
        shape = (len(EXPONENTS), len(at), len(widths), len(ratios), len(x))
        if not np.isfinite(at[0]) or (len(ratios) == 1 and ratios[0] == 1):
            return np.broadcast_to(whole, shape).reshape(-1, len(x))
        x_before = bent(x, at[:, None, None, None], widths[:, None, None])
        before = growth(x_before, EXPONENTS[:, None, None, None, None], self._origin)
        found = whole - before
        found = ratios[:, None] * found
        found += before
        return found.reshape(-1, len(x))

    def weigh(self, y: NDArray, points: float) -> Posterior:
        """Fit level and size to every shape, and weigh the shapes.

        Noise is normal with an unknown deviation. Each family has the same probability before anything is measured.

        Args:
            y: [n].
            points: How many independent points they are worth.
        """
        mean = float(y.mean())
        off = y - mean
        along = self._centred @ off
        size = along / self._power
        error = float(off @ off) - along * size
        jump = np.zeros_like(size)
        steps = self._steps
        height = (self._pure @ off) / self._pure_power
        jump[steps] = height
        error[steps] -= height**2 * self._pure_power
        size[steps] -= height * self._overlap
        error = np.maximum(error, 1e-12 * max(float(off @ off), 1e-300))
        level = mean - size * self._first
        level[steps] -= height * self._step_means
        free = max(points - 2, 1.0)
        log_weight = self._log_prior - free / 2 * np.log(error)
        log_weight[steps] -= np.log(points) / 2  # for the height, which is fitted too
        weight = np.exp(log_weight - log_weight.max())
        deviation = np.sqrt(error / free / self._power * len(y) / max(points, 1.0))
        return Posterior(weight / weight.sum(), level, size, deviation, error, jump)

    def curve(self, posterior: Posterior, i: int) -> NDArray:
        """[n] the fitted curve of shape `i`."""
        stepped = posterior.jump[i] * (self._x > self.at[i]) if self.family[i] == 1 else 0.0
        return posterior.level[i] + posterior.size[i] * self._shapes[i] + stepped

    def _limbs(self, family: str, at: NDArray, widths: NDArray, ratios: NDArray) -> tuple[NDArray, ...]:
        grid = np.meshgrid(EXPONENTS, at, widths, ratios, indexing="ij")
        columns = [part.ravel() for part in grid]
        return (np.full(len(columns[0]), FAMILIES.index(family)), *columns)

    def _prior(self) -> NDArray:
        mean, deviation = _EXPONENT_PRIOR
        spacing = np.gradient(EXPONENTS)[np.searchsorted(EXPONENTS, self._exponent)]
        log_prior = -(((self._exponent - mean) / deviation) ** 2) / 2 + np.log(spacing)
        limbs = self.family >= 2
        log_prior[limbs] -= self._width[limbs] / _WIDTH_PRIOR
        for family in range(len(FAMILIES)):
            mine = self.family == family
            log_prior[mine] -= np.log(np.exp(log_prior[mine]).sum())
        return log_prior
