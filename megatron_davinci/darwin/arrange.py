"""Orders and groups of documents by their vectors: clusters, nearest neighbours, a path through them.

Clusters are those of CLIMB (2504.13161: embeddings, k-means), which become sources of a mixture. The path is that of
In-Context Pretraining (2310.10638, section 2.2, algorithm 1): from a document of the fewest neighbours along the
nearest one that has not been visited, and anew from such a document where there is none.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.darwin.vectors import Vectors

Numbers = NDArray[np.int64]
_ROWS = 2048  # whose similarities are in memory at once
_CELL = 32_768  # documents among which neighbours are looked for exactly; more are parted into cells first
_ROUNDS, _STARTS = 50, 6


def k_means(vectors: Vectors, clusters: int, seed: int = 0) -> Numbers:
    """Cluster directions: k-means++ (Arthur and Vassilvitskii 2007) and Lloyd's rounds on the sphere; the best of 6.

    Args:
        vectors: float32 [n, d], of length 1.
        clusters: At most n.
        seed: Draws the first centres.

    Returns:
        The cluster of each, int64 [n]; numbered by size, the largest first. None is empty.
    """
    draw = np.random.default_rng(seed)
    own = max(
        (_lloyd(vectors, _centres(vectors, clusters, draw)) for _ in range(_STARTS)),
        key=lambda found: found[1],
    )[0]
    by_size = np.argsort(-np.bincount(own, minlength=clusters), kind="stable")
    number = np.empty(clusters, np.int64)
    number[by_size] = np.arange(clusters)
    return number[own]


def _centres(vectors: Vectors, clusters: int, draw: np.random.Generator) -> Vectors:
    """First centres, each drawn by how far documents are from those that were chosen before."""
    chosen = [int(draw.integers(len(vectors)))]
    far = np.maximum(0, 1 - vectors @ vectors[chosen[0]])
    while len(chosen) < clusters:
        weights = far.astype(np.float64)
        weights[chosen] = 0
        if not weights.any():  # only copies of what is chosen are left
            weights = np.ones(len(vectors))
            weights[chosen] = 0
        chosen.append(int(draw.choice(len(vectors), p=weights / weights.sum())))
        far = np.minimum(far, np.maximum(0, 1 - vectors @ vectors[chosen[-1]]))
    return vectors[chosen].copy()


def _lloyd(vectors: Vectors, centres: Vectors) -> tuple[Numbers, float]:
    """The cluster of each document, none empty, and the sum of similarities to their centres."""
    clusters, own, total = len(centres), np.full(len(vectors), -1, np.int64), 0.0
    for _ in range(_ROUNDS):
        nearest, similarity = _nearest(vectors, centres)
        total = float(similarity.sum(dtype=np.float64))
        for empty in np.setdiff1d(np.arange(clusters), nearest):
            movable = np.where(np.bincount(nearest, minlength=clusters)[nearest] > 1, similarity, np.inf)
            worst = int(np.argmin(movable))
            nearest[worst], similarity[worst] = empty, np.inf
        if (nearest == own).all():
            break
        own = nearest
        sums = np.zeros(centres.shape)
        np.add.at(sums, own, vectors)
        centres = (sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)).astype(np.float32)
    return own, total


def _nearest(vectors: Vectors, centres: Vectors) -> tuple[Numbers, NDArray[np.float32]]:
    nearest, similarity = np.empty(len(vectors), np.int64), np.empty(len(vectors), np.float32)
    for begin in range(0, len(vectors), _ROWS):
        found = vectors[begin : begin + _ROWS] @ centres.T
        nearest[begin : begin + _ROWS] = found.argmax(axis=1)
        similarity[begin : begin + _ROWS] = found.max(axis=1)
    return nearest, similarity


def neighbours(vectors: Vectors, most: int, seed: int = 0) -> tuple[Numbers, NDArray[np.float32]]:
    """The nearest neighbours of each document, nearest first.

    Of more than 32,768 documents, those of one k-means cell only: the time grows with the square of a cell.

    Args:
        vectors: float32 [n, d], of length 1.
        most: Neighbours of each.
        seed: Draws the cells.

    Returns:
        Their places, int64 [n, most], with -1 where there is none; and cosine similarities, float32 likewise.
    """
    count = len(vectors)
    found = np.full((count, most), -1, np.int64)
    similar = np.zeros((count, most), np.float32)
    cells = -(-2 * count // _CELL) if count > _CELL else 1
    cell = k_means(vectors, cells, seed) if cells > 1 else np.zeros(count, np.int64)
    for each in range(cells):
        members = np.nonzero(cell == each)[0]
        take = min(most, len(members) - 1)
        for begin in range(0, len(members), _ROWS) if take else ():
            rows = members[begin : begin + _ROWS]
            close = vectors[rows] @ vectors[members].T
            close[np.arange(len(rows)), begin + np.arange(len(rows))] = -np.inf
            best = np.argpartition(-close, take - 1, axis=1)[:, :take]
            value = np.take_along_axis(close, best, axis=1)
            order = np.lexsort((best, -value), axis=1)
            found[rows[:, None], np.arange(take)] = members[np.take_along_axis(best, order, axis=1)]
            similar[rows[:, None], np.arange(take)] = np.take_along_axis(value, order, axis=1)
    return found, similar


def path(near: Numbers, similar: NDArray[np.float32]) -> Numbers:
    """All documents in an order in which each stands beside a near one, where there is one left.

    Args:
        near: What `neighbours` returns; an edge counts in both directions.
        similar: Likewise.

    Returns:
        A permutation, int64 [n].
    """
    count, most = near.shape
    one, other = np.repeat(np.arange(count), most), near.ravel()
    there = other >= 0
    one, other, weight = one[there], other[there], similar.ravel()[there]
    ones, others = np.concatenate([one, other]), np.concatenate([other, one])
    order = np.lexsort((others, -np.concatenate([weight, weight]), ones))
    ones, others = ones[order], others[order]
    begins = np.searchsorted(ones, np.arange(count + 1))
    degree = (
        np.bincount(np.unique(ones * count + others) // count, minlength=count)
        if len(ones)
        else np.zeros(count)
    )
    at = begins[:-1].copy()
    visited = np.zeros(count, bool)
    found = np.empty(count, np.int64)
    written = 0
    for start in np.lexsort((np.arange(count), degree)).tolist():
        here = start
        while here >= 0 and not visited[here]:
            visited[here] = True
            found[written] = here
            written += 1
            following = -1
            while at[here] < begins[here + 1]:
                candidate = int(others[at[here]])
                at[here] += 1
                if not visited[candidate]:
                    following = candidate
                    break
            here = following
    return found


def groups_of(order: Numbers, lengths: Numbers, most: int) -> list[Numbers]:
    """The order cut into groups of at most so many tokens; a longer document is a group by itself.

    Args:
        order: Places of documents, int64 [n].
        lengths: Tokens of each place, int64 [n].
        most: Tokens of a group.
    """
    bounds, have = [0], 0
    for position, tokens in enumerate(lengths[order].tolist()):
        if have and have + tokens > most:
            bounds.append(position)
            have = 0
        have += tokens
    return [order[begin:end] for begin, end in pairwise([*bounds, len(order)]) if end > begin]


def closeness(vectors: Vectors, order: Numbers) -> float:
    """Mean cosine similarity of documents that follow each other."""
    ordered = vectors[order]
    return float((ordered[1:] * ordered[:-1]).sum(axis=1).mean()) if len(order) > 1 else 0.0
