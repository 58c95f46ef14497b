"""How far a conversion is: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_davinci.convert.resumable import Progress as Callback


@contextmanager
def bar(what: str) -> Iterator[Callback]:
    """Show bytes done; the block gets what is told of them.

    Args:
        what: What is being done, in a word or two.
    """
    with _shown(what, DownloadColumn(), TransferSpeedColumn()) as callback:
        yield callback


@contextmanager
def layers(what: str) -> Iterator[Callback]:
    """Show layers done.

    Args:
        what: What is being done, in a word or two.
    """
    with _shown(what, MofNCompleteColumn(), TextColumn("layers")) as callback:
        yield callback


@contextmanager
def _shown(what: str, *columns: ProgressColumn) -> Iterator[Callback]:
    shown = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    screen = Console(stderr=True)
    with Progress(*shown, console=screen, disable=not screen.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
