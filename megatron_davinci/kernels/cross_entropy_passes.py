"""The passes of the cross entropy over logits, each as an op of torch: a kernel, or the same in plain torch.

Between them ranks exchange numbers of a row's size (`cross_entropy.py`). The kernels are in
`csrc/kernels/cross_entropy.cu`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_davinci.kernels.operators import operator
from megatron_davinci.kernels.ways import way_of

_OP = "cross_entropy"
_BYTES = 32 << 20  # of fp32 that the plain form holds at once


@operator(
    "davinci::cross_entropy_statistics",
    mutates_args=(),
    schema="(Tensor logits, Tensor labels, int first, int tokens, int ignored) -> (Tensor, Tensor, Tensor)",
)
def statistics(
    logits: Tensor, labels: Tensor, first: int, tokens: int, ignored: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of this rank's logits: the largest, the sum of exponentials relative to it, the label's logit.

    Args:
        logits: [rows, width] bf16 or fp32.
        labels: [rows] int64.
        first: The token of this rank's first column.
        tokens: Logits of tokens from this one on are padding.
        ignored: A label that has no loss.

    Returns:
        Three of [rows] fp32. The label's logit is 0 where the label is another rank's or ignored, and no number where
        it is no token.
    """
    rows, width = logits.shape
    largest, total, target = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    way = way_of(_OP, logits, labels)
    if way.has_kernels:
        if rows:
            way.launch(
                "cross_entropy_statistics",
                rows,
                logits,
                logits,
                labels,
                largest,
                total,
                target,
                rows,
                width,
                first,
                tokens,
                ignored,
            )
        return largest, total, target
    for part in _parts(logits):
        row = _Rows(labels[part], width, first, tokens, ignored)
        wide = logits[part, : row.columns].float()
        most = wide.amax(-1) if row.columns else torch.full_like(largest[part], float("-inf"))
        largest[part] = most
        shift = torch.where(most == float("-inf"), 0.0, most)
        total[part] = (wide - shift.unsqueeze(-1)).exp().sum(-1)
        target[part] = row.target(logits[part])
    return largest, total, target


@operator(
    "davinci::cross_entropy_gradient_",
    mutates_args={"logits"},
    schema="(Tensor(a!) logits, Tensor labels, Tensor log_z, int first, int tokens, int ignored) -> ()",
)
def gradient_(logits: Tensor, labels: Tensor, log_z: Tensor, first: int, tokens: int, ignored: int) -> None:
    """Overwrite logits by P - Y, with 0 in rows of ignored labels and in padding.

    Args:
        logits: [rows, width] bf16 or fp32.
        labels: [rows] int64.
        log_z: [rows] fp32, of the whole vocabulary.
        first: The token of this rank's first column.
        tokens: Logits of tokens from this one on are padding.
        ignored: A label that has no loss.
    """
    rows, width = logits.shape
    way = way_of(_OP, logits, labels, log_z)
    if way.has_kernels:
        if rows:
            arguments = (logits, labels, log_z, rows, width, first, tokens, ignored)
            way.launch("cross_entropy_gradient", rows, logits, *arguments)
        return
    for part in _parts(logits):
        row = _Rows(labels[part], width, first, tokens, ignored)
        probability = (logits[part].float() - log_z[part].unsqueeze(-1)).exp_()
        probability[:, row.columns :] = 0.0
        probability -= row.one_hot()
        logits[part] = probability.masked_fill_(row.ignored.unsqueeze(-1), 0.0).to(logits.dtype)


@operator(
    "davinci::cross_entropy_whole_",
    mutates_args={"logits"},
    schema="(Tensor(a!) logits, Tensor labels, int tokens, int ignored) -> (Tensor, Tensor)",
)
def whole_(logits: Tensor, labels: Tensor, tokens: int, ignored: int) -> tuple[Tensor, Tensor]:
    """`statistics` and `gradient_` at once, where the vocabulary is whole.

    Args:
        logits: [rows, vocabulary] bf16 or fp32.
        labels: [rows] int64.
        tokens: Logits of tokens from this one on are padding.
        ignored: A label that has no loss.

    Returns:
        [rows] fp32 each: log Z, and the logit of the label.
    """
    rows, width = logits.shape
    way = way_of(_OP, logits, labels)
    if way.has_kernels:
        log_z, target = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
        if rows:
            arguments = (logits, labels, log_z, target, rows, width, tokens, ignored)
            way.launch("cross_entropy_whole", rows, logits, *arguments)
        return log_z, target
    largest, total, target = statistics(logits, labels, 0, tokens, ignored)
    log_z = largest + total.log()
    gradient_(logits, labels, log_z, 0, tokens, ignored)
    return log_z, target


@operator(
    "davinci::cross_entropy_scaled_",
    mutates_args={"gradient"},
    schema="(Tensor(a!) gradient, Tensor labels, Tensor scale, Tensor shift, int first, int tokens, int ignored)"
    " -> ()",
)
def scaled_(
    gradient: Tensor, labels: Tensor, scale: Tensor, shift: Tensor, first: int, tokens: int, ignored: int
) -> None:
    """Overwrite P - Y by `scale * (P - Y) + shift * Y`, which is the gradient of the logits.

    Args:
        gradient: [rows, width] bf16 or fp32: what `gradient_` left.
        labels: [rows] int64.
        scale: [rows] fp32, the sum of what both losses of a row weigh in its gradient.
        shift: [rows] fp32, what the z-loss weighs in it.
        first: The token of this rank's first column.
        tokens: Logits of tokens from this one on are padding.
        ignored: A label that has no loss.
    """
    rows, width = gradient.shape
    way = way_of(_OP, gradient, labels, scale, shift)
    if way.has_kernels:
        if rows:
            arguments = (gradient, labels, scale, shift, rows, width, first, tokens, ignored)
            way.launch("cross_entropy_scaled", rows, gradient, *arguments)
        return
    for part in _parts(gradient):
        row = _Rows(labels[part], width, first, tokens, ignored)
        factor, more = (one[part].masked_fill(row.ignored, 0.0).unsqueeze(-1) for one in (scale, shift))
        wide = gradient[part].float().mul_(factor)
        gradient[part] = wide.add_(more * row.one_hot()).to(gradient.dtype)


@operator(
    "davinci::cross_entropy_backward_",
    mutates_args={"logits"},
    schema="(Tensor(a!) logits, Tensor labels, Tensor log_z, Tensor scale, Tensor shift, int first, int tokens, "
    "int ignored) -> ()",
)
def backward_(
    logits: Tensor,
    labels: Tensor,
    log_z: Tensor,
    scale: Tensor,
    shift: Tensor,
    first: int,
    tokens: int,
    ignored: int,
) -> None:
    """Overwrite logits by their gradient, `scale * (P - Y) + shift * Y`: `gradient_` and `scaled_` in one pass.

    Args:
        logits: [rows, width] bf16 or fp32.
        labels: [rows] int64.
        log_z: [rows] fp32, of the whole vocabulary.
        scale: [rows] fp32, the sum of what both losses of a row weigh in its gradient.
        shift: [rows] fp32, what the z-loss weighs in it.
        first: The token of this rank's first column.
        tokens: Logits of tokens from this one on are padding.
        ignored: A label that has no loss.
    """
    rows, width = logits.shape
    way = way_of(_OP, logits, labels, log_z, scale, shift)
    if way.has_kernels:
        if rows:
            arguments = (logits, labels, log_z, scale, shift, rows, width, first, tokens, ignored)
            way.launch("cross_entropy_backward", rows, logits, *arguments)
        return
    for part in _parts(logits):
        row = _Rows(labels[part], width, first, tokens, ignored)
        left = (logits[part].float() - log_z[part].unsqueeze(-1)).exp_()
        left[:, row.columns :] = 0.0
        one_hot = row.one_hot()
        left -= one_hot
        left.mul_(scale[part].unsqueeze(-1)).add_(shift[part].unsqueeze(-1) * one_hot)
        logits[part] = left.masked_fill_(row.ignored.unsqueeze(-1), 0.0).to(logits.dtype)


@statistics.register_fake
def _(logits: Tensor, labels: Tensor, first: int, tokens: int, ignored: int) -> tuple[Tensor, Tensor, Tensor]:
    largest, total, target = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))
    return largest, total, target


@gradient_.register_fake
def _(logits: Tensor, labels: Tensor, log_z: Tensor, first: int, tokens: int, ignored: int) -> None:
    return None


@whole_.register_fake
def _(logits: Tensor, labels: Tensor, tokens: int, ignored: int) -> tuple[Tensor, Tensor]:
    log_z, target = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
    return log_z, target


@scaled_.register_fake
def _(
    gradient: Tensor, labels: Tensor, scale: Tensor, shift: Tensor, first: int, tokens: int, ignored: int
) -> None:
    return None


@backward_.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    log_z: Tensor,
    scale: Tensor,
    shift: Tensor,
    first: int,
    tokens: int,
    ignored: int,
) -> None:
    return None


class _Rows:
    """Labels of some rows as columns of a rank's part of the vocabulary."""

    def __init__(self, labels: Tensor, width: int, first: int, tokens: int, ignored: int) -> None:
        self.width, self.columns = width, max(0, min(width, tokens - first))
        self.ignored = labels == ignored
        self.wrong = ((labels < 0) | (labels >= tokens)) & ~self.ignored
        here = (labels >= first) & (labels < first + self.columns) & ~self.ignored & ~self.wrong
        self.here, self.column = here, torch.where(here, labels - first, 0)

    def target(self, logits: Tensor) -> Tensor:
        """The labels' logits."""
        if self.columns:
            found = logits.gather(-1, self.column.unsqueeze(-1)).squeeze(-1).float()
        else:
            found = torch.zeros(len(logits), device=logits.device)
        return torch.where(self.here, found, 0.0).masked_fill(self.wrong, float("nan"))

    def one_hot(self) -> Tensor:
        """[rows, width] fp32."""
        made = torch.zeros(len(self.here), self.width, device=self.here.device)
        return made.scatter_(-1, self.column.unsqueeze(-1), self.here.float().unsqueeze(-1))


def _parts(logits: Tensor) -> Iterator[slice]:
    """Rows by the plain form's buffer of fp32."""
    rows, width = logits.shape
    step = max(1, _BYTES // (4 * max(1, width)))
    for first in range(0, rows, step):
        yield slice(first, first + step)
