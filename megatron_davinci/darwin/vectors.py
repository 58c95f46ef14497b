"""Vectors of documents without a model: hashed TF-IDF of tokens and pairs of tokens, brought to few dimensions.

Latent semantic analysis (Deerwester et al. 1990), by the randomised decomposition of Halko, Martinsson and Tropp
(0909.4061, algorithms 4.3 and 5.1). The same tokens, parameters and seed give the same vectors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
_MIX = np.uint64(0x9E3779B97F4A7C15)
_OVERSAMPLING, _POWERS = 10, 2


def vectors(
    documents: Iterable[NDArray[np.integer]],
    dimensions: int = 64,
    bits: int = 18,
    most: int = 4096,
    seed: int = 0,
) -> Vectors:
    """A vector for each document; related ones point the same way.

    Args:
        documents: Token ids of each, [tokens].
        dimensions: Of the vectors.
        bits: Features are `2**bits`.
        most: Tokens of a document that are looked at.
        seed: Draws the projection.

    Returns:
        float32 [documents, dimensions], each of length 1, or 0 for a document that shares nothing with another;
        fewer columns for fewer documents.
    """
    from scipy.sparse import csr_matrix

    places, values, ends = [np.empty(0, np.int64)], [np.empty(0, np.float32)], [0]
    for tokens in documents:
        found, counts = np.unique(_features(np.asarray(tokens[:most]), bits), return_counts=True)
        places.append(found)
        values.append((1 + np.log(counts)).astype(np.float32))
        ends.append(ends[-1] + len(found))
    flat, count = np.concatenate(places), len(ends) - 1
    in_documents = np.bincount(flat, minlength=1 << bits)
    # What one document alone has relates it to none.
    shared = in_documents > 1
    weights = np.log((1 + count) / (1 + in_documents)).astype(np.float32)
    column = np.cumsum(shared) - 1
    kept = shared[flat]
    ends = np.concatenate([[0], np.cumsum(kept)])[ends].tolist()
    flat, value = flat[kept], np.concatenate(values)[kept]
    matrix = csr_matrix(
        (value * weights[flat], column[flat], np.array(ends, np.int64)),
        shape=(count, max(1, int(shared.sum()))),
    )
    lengths = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    matrix.data /= np.repeat(np.maximum(lengths, 1e-12), np.diff(matrix.indptr)).astype(np.float32)
    return _unit(_projected(matrix, min(dimensions, count), seed))


def _features(tokens: NDArray[np.integer], bits: int) -> NDArray[np.int64]:
    """Hashes of tokens and of pairs of neighbours, int64 below `2**bits`."""
    one = (tokens.astype(np.uint64) + np.uint64(1)) * _MIX
    two = (one[:-1] ^ (one[1:] << np.uint64(7)) ^ (one[1:] >> np.uint64(57))) * _MIX
    return (np.concatenate([one, two]) >> np.uint64(64 - bits)).astype(np.int64)


def _projected(matrix: Any, dimensions: int, seed: int) -> Vectors:
    """The rows in the coordinates of the largest singular vectors, scaled by the singular values."""
    draw = np.random.default_rng(seed)
    width = min(dimensions + _OVERSAMPLING, *matrix.shape)
    basis = np.linalg.qr(matrix @ draw.standard_normal((matrix.shape[1], width), np.float32))[0]
    for _ in range(_POWERS):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    left, singular, _ = np.linalg.svd((matrix.T @ basis).T, full_matrices=False)
    found: Vectors = (basis @ left[:, :dimensions] * singular[:dimensions]).astype(np.float32)
    return found


def _unit(rows: Vectors) -> Vectors:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 1e-9)
