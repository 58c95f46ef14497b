"""The second stage of a weight's gradient: shares that sets of rows have in it, summed in a fixed order."""

from __future__ import annotations

from torch import Tensor

from megatron_davinci.kernels.ways import Way

_COLUMNS = 8  # that a block of the kernel takes


def parts(way: Way, work: int, most: int) -> int:
    """Into how many shares to sum: as many as there is work, not more than are of use.

    Args:
        way: How kernels run; emulated blocks are few, and each then has some of them.
        work: How many there could be.
        most: How many blocks of the kernel an H100 runs at once. It is the same on any GPU, so that sums have the
            same order, and the same bits.
    """
    return max(1, min(most, 2 * way.most_blocks, work))


def sum_columns(way: Way, shares: Tensor, out: Tensor) -> None:
    """Write the sum of shares.

    Args:
        way: One that has kernels.
        shares: [parts, columns] fp32.
        out: [columns] bf16 or fp32.
    """
    number, columns = shares.shape
    if columns:
        way.launch("column_sums", -(-columns // _COLUMNS), out, shares, out, number, columns)
