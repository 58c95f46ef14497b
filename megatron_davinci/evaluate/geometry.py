"""How many directions a model's representations use: RankMe and alpha-ReQ of their covariance.

Li et al., arXiv 2509.23024: over training, the covariance of last-token states widens and narrows again in phases
that the loss does not show.

    F [M, d]: the last layer's state at the last token of M sequences, columns centred
    s_1 >= ... >= s_d: eigenvalues of F^T F / M, p = s / sum(s)
    RankMe   = exp(-sum p ln p)
    alphaReQ = -slope of ln s_i over ln i

RankMe is 1 where one direction is used and d where all are used alike. The window of the slope is not stated there;
here it is what lies above a floor of noise, without the first eigenvalues, which are often outliers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.errors import DataError

PROBE = 512  # tokens of a sequence, as there
SKIPPED = 2  # eigenvalues before the slope's window
FLOOR = 1e-9  # of the largest eigenvalue; below it there is rounding only
_LEAST = 3  # eigenvalues that a slope is fitted to


@dataclass(frozen=True)
class Geometry:
    """Of a set of representations.

    Attributes:
        rank_me: In [1, d].
        alpha_req: NaN where fewer than three eigenvalues are in the window.
        sequences: M.
        dimensions: d.
    """

    rank_me: float
    alpha_req: float
    sequences: int
    dimensions: int


def probe(tokenizer: Tokenizer, texts: Mapping[str, Sequence[str]], longest: int) -> list[list[int]]:
    """The beginnings of all texts, as tokens: what the states are of.

    Args:
        tokenizer: The model's.
        texts: By domain.
        longest: `max_sequence_length`.
    """
    encoded = tokenizer.encode_batch([text for of in texts.values() for text in of])
    return [one[: min(PROBE, longest)].tolist() for one in encoded if len(one)]


def geometry(states: ArrayLike) -> Geometry:
    """Of states [M, d], in float64.

    Raises:
        DataError: Fewer than two sequences, a value that is not a number, or states that are all the same.
    """
    F = np.asarray(states, np.float64)
    if F.ndim != 2 or len(F) < 2 or not np.isfinite(F).all():
        raise DataError(
            "Representations have no geometry.",
            found="values that are not numbers"
            if F.ndim == 2 and len(F) > 1
            else f"states of shape {list(F.shape)}, where two texts with tokens are needed",
            expected="[sequences, channels], two sequences at least",
        )
    F = F - F.mean(0)
    # The smaller of the two products has the same eigenvalues but for zeros.
    product = F.T @ F if F.shape[1] <= F.shape[0] else F @ F.T
    values = np.clip(np.linalg.eigvalsh(product / len(F))[::-1], 0.0, None)
    if values[0] <= 0:
        raise DataError("Representations have no geometry.", found="states that are all the same")
    return Geometry(rank_me(values), alpha_req(values), *F.shape)


def rank_me(eigenvalues: ArrayLike) -> float:
    """`exp` of the entropy of the eigenvalues' shares."""
    values = np.asarray(eigenvalues, np.float64)
    p = values / values.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def alpha_req(eigenvalues: ArrayLike, *, skipped: int = SKIPPED, floor: float = FLOOR) -> float:
    """The exponent of a power law that the eigenvalues fall by, by least squares in logarithms.

    Args:
        eigenvalues: Descending.
        skipped: The first ones, which are left out.
        floor: Those below this share of the largest are left out too.
    """
    values: NDArray[np.float64] = np.asarray(eigenvalues, np.float64)
    places = np.flatnonzero(values > floor * values[0])
    places = places[places >= skipped]
    if len(places) < _LEAST:
        return float("nan")
    return float(-np.polyfit(np.log(places + 1.0), np.log(values[places]), 1)[0])
