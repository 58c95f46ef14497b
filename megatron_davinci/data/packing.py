"""Best-fit packing: documents into sequences of one length, each document whole where it fits.

Ding et al., "Fewer Truncations Improve Language Modeling" (ICML 2024, arXiv:2404.10830), section 3: a document longer
than a sequence is cut into sequences of full length and a rest; the pieces, longest first, each go into the sequence
that has the least room left that is enough.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Packed(NamedTuple):
    """Where pieces of documents go, in the order in which they are written.

    Attributes:
        document: [pieces] int64, which document.
        start: [pieces] int64, the first token in it.
        length: [pieces] int64, tokens.
        sequence: [pieces] int64, which sequence, counted from 0 and never decreasing.
        sequences: How many there are.
    """

    document: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    sequence: NDArray[np.int64]
    sequences: int


def best_fit(lengths: NDArray[np.integer], sequence_length: int) -> Packed:
    """Pack documents of these lengths.

    Sequences come in the order of their earliest document, and the pieces of each likewise.

    Args:
        lengths: [documents], tokens of each, none negative; those of no token are left out.
        sequence_length: Tokens of a sequence, at least 1.
    """
    lengths = np.asarray(lengths, np.int64)
    pieces = -(-lengths // sequence_length)
    document = np.repeat(np.arange(len(lengths)), pieces)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = nth * sequence_length
    length = np.minimum(lengths[document] - start, sequence_length)
    sequence = np.empty(len(document), np.int64)
    # Sequences by the room they have left, and a number whose bit r says that there is one with room r: the least
    # room that is enough is its lowest bit from the piece's length on.
    with_room: list[list[int]] = [[] for _ in range(sequence_length + 1)]
    rooms = count = 0
    for piece in np.argsort(-length, kind="stable").tolist():
        need = int(length[piece])
        enough = rooms >> need
        if enough:
            room = need + (enough & -enough).bit_length() - 1
            one = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            one, room, count = count, sequence_length, count + 1
        sequence[piece] = one
        if left := room - need:
            with_room[left].append(one)
            rooms |= 1 << left
    # Numbered anew by first piece, so that the documents' order is kept as far as packing lets it.
    _, earliest, which = np.unique(sequence, return_index=True, return_inverse=True)
    rank = np.empty(count, np.int64)
    rank[np.argsort(earliest, kind="stable")] = np.arange(count)
    sequence = rank[which] if len(which) else sequence
    order = np.argsort(sequence, kind="stable")
    return Packed(document[order], start[order], length[order], sequence[order], count)
