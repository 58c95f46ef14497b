"""Many tensors for one launch: a table, on their device, of runs of elements, which blocks take or draw."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ELEMENTS = 1 << 13
"""Of a run, at most; a multiple of the groups that 8-bit moments have, and of the tiles that blocks take. AdamW with
moments in 8 bits takes 5% longer on an H200 with 2^15; with 2^12 it takes as long, and the table is twice as long."""

_COLUMNS = 8
_COUNT = 6  # the column that has a run's elements
_KEPT = 16  # tables: an optimizer needs one for each parameter group

_tables: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()


def table(columns: Sequence[tuple[Sequence[Tensor], float]]) -> Tensor:
    """Addresses of every run.

    A table is kept for as long as it is asked for: an optimizer has the same tensors at every step. What it says
    follows from what its columns are, from addresses and from sizes alone, so one that is kept is right for whatever
    tensors lie there.

    Args:
        columns: For each column of addresses (at most 6) its tensors, and the bytes that an element of the first
            column's tensor takes in them. The n-th tensors of all columns belong together, and the first column's say
            how many elements there are. No tensors: addresses are 0.

    Returns:
        [runs, 8] int64 on the tensors' device: addresses by column, in column 6 the run's elements.
    """
    first, elements = columns[0][0], ELEMENTS
    counts = [tensor.numel() for tensor in first]
    addresses = [[tensor.data_ptr() for tensor in tensors] for tensors, _ in columns]
    # By columns: moments of another kind may lie where some lay before.
    by_column = tuple((width, tuple(here)) for (_, width), here in zip(columns, addresses, strict=True))
    key = (first[0].device, elements, tuple(counts), by_column)
    kept = _tables.get(key)
    if kept is None:
        kept = torch.from_numpy(_rows(addresses, [width for _, width in columns], counts, elements))
        kept = _tables[key] = kept.to(first[0].device)
        if len(_tables) > _KEPT:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return kept


def _rows(
    addresses: Sequence[Sequence[int]], widths: Sequence[float], counts: Sequence[int], elements: int
) -> np.ndarray:
    runs = [-(-count // elements) for count in counts]
    rows = np.zeros((sum(runs), _COLUMNS), dtype=np.int64)
    end = 0
    for number, (count, here) in enumerate(zip(counts, runs, strict=True)):
        part = rows[end : end + here]
        begins = np.arange(here, dtype=np.int64) * elements
        for column, (tensors, width) in enumerate(zip(addresses, widths, strict=True)):
            if tensors:
                part[:, column] = tensors[number] + begins // elements * int(width * elements)
        part[:, _COUNT] = np.minimum(count - begins, elements)
        end += here
    return rows
