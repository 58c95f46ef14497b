"""What a person sees while a run goes on: a live panel on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from megatron_davinci.config.units import format_tokens
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.phases import BETWEEN_STEPS
from megatron_davinci.train.source_losses import loss_by_domain


def format_seconds(seconds: float) -> str:
    """Write a duration: `42 s`, `3:07 min`, `5:02 h`, `3 d 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 86400:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


class RunProgress:
    """Shows steps as they come.

    Args:
        schedule: The run's schedule.
        mode: `auto`, `live`, `lines` or `none`.
        every_steps: Distance of lines.
        console: Where to write.
        domains: The domain of each source.
    """

    def __init__(
        self,
        schedule: Schedule,
        mode: str,
        every_steps: int,
        console: Console | None = None,
        *,
        domains: Mapping[str, str] | None = None,
    ) -> None:
        self._domains = domains or {}
        self.console = console or Console(highlight=False)
        if mode == "auto":
            mode = "live" if self.console.is_terminal else "lines"
        self.mode, self.every_steps, self.schedule = mode, every_steps, schedule
        self._rates: deque[tuple[int, float]] = deque(maxlen=50)
        self._recent: deque[dict[str, Any]] = deque(maxlen=50)
        self._last: dict[str, Any] = {}
        self._heldout: dict[str, float] = {}
        self._live: Live | None = None
        self._bars = Progress(
            TextColumn("{task.description:>12}", markup=False),
            BarColumn(bar_width=44),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
        )
        self._tasks: dict[int, Any] = {}
        for index, stage in enumerate(schedule.stages):
            segments = schedule.stage_segments(index)
            if segments:
                samples = segments[-1].end_sample - segments[0].first_sample
                note = f"{format_tokens(samples * schedule.sequence_length)} tokens"
                self._tasks[index] = self._bars.add_task(f"stage {stage.name}", total=samples, note=note)

    def __enter__(self) -> RunProgress:
        if self.mode == "live":
            self._live = Live(self._render(), console=self.console, refresh_per_second=4, transient=False)
            self._live.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._live is not None:
            self._live.update(self._render())
            self._live.__exit__(*exc)
            self._live = None

    def message(self, text: str) -> None:
        """Say one line."""
        if self.mode != "none":
            self.console.print(text, markup=False)

    def step(self, record: dict[str, Any]) -> None:
        """Show a step, by its line of `metrics.jsonl`."""
        self._last = record
        tokens = record["global_batch_size"] * self.schedule.sequence_length
        self._rates.append((tokens, record["seconds"]))
        self._recent.append(record)
        for index, task in self._tasks.items():
            segments = self.schedule.stage_segments(index)
            self._bars.update(task, completed=max(0, record["consumed_samples"] - segments[0].first_sample))
        if self._live is not None:
            self._live.update(self._render())
        elif self.mode == "lines" and (
            record["step"] % self.every_steps == 0 or record["step"] in (1, self.schedule.total_steps)
        ):
            self.console.print(self._line(), markup=False, soft_wrap=True)

    def heldout(self, step: int, loss: dict[str, float]) -> None:
        """Show an evaluation."""
        self._heldout = loss
        if self._live is not None:
            self._live.update(self._render())
        elif self.mode == "lines":
            self.console.print(
                f"step {step:>6}  held-out loss  {_by_domain(loss)}", markup=False, soft_wrap=True
            )

    @property
    def tokens_per_second(self) -> float:
        """Over the last steps."""
        seconds = sum(s for _, s in self._rates)
        return sum(t for t, _ in self._rates) / seconds if seconds else 0.0

    def _eta(self) -> str:
        rate = self.tokens_per_second
        left = (self.schedule.total_samples - self._last["consumed_samples"]) * self.schedule.sequence_length
        return format_seconds(left / rate) if rate else "?"

    def _line(self) -> str:
        r = self._last
        return (
            f"step {r['step']:>6}/{self.schedule.total_steps}  stage {r['stage']}  loss {r['loss']:.4f}  "
            f"grad {r['grad_norm']:.2f}  lr {r['learning_rate']:.2e}  batch {r['global_batch_size']}  "
            f"{format_tokens(self.tokens_per_second)} tokens/s  "
            f"{100 * r['flops_utilization']:.0f}% of matmul peak  ETA {self._eta()}"
        )

    def _render(self) -> Panel:
        if not self._last:
            return Panel(Text("first step ..."), title="davinci train", border_style="cyan")
        r = self._last
        table = Table.grid(padding=(0, 3))
        table.add_row(
            f"step [b]{r['step']}[/b]/{self.schedule.total_steps}",
            f"stage [b]{escape(r['stage'])}[/b]",
            f"loss [b]{r['loss']:.4f}[/b]",
            f"grad norm {r['grad_norm']:.2f}",
        )
        table.add_row(
            f"lr {r['learning_rate']:.2e}",
            f"batch {r['global_batch_size']}",
            f"[b]{format_tokens(self.tokens_per_second)}[/b] tokens/s, "
            f"{100 * r['flops_utilization']:.0f}% of matmul peak",
            f"ETA [b]{self._eta()}[/b]",
        )
        parts: list[Any] = [table]
        if phases := shares_of_phases(record.get("phases", {}) for record in self._recent):
            parts.append(Text(phases, style="dim"))
        parts += [Text(""), self._bars]
        trained = loss_by_domain((record.get("sources", {}) for record in self._recent), self._domains)
        if len(trained) > 1:
            parts += [Text(""), Text(f"training loss  {_by_domain(trained)}")]
        if self._heldout:
            parts += [Text(""), Text(f"held-out loss  {_by_domain(self._heldout)}")]
        return Panel(Group(*parts), title="davinci train", border_style="cyan")


def shares_of_phases(steps: Iterable[dict[str, float]]) -> str:
    """Where the time of some steps went, in a line: `forward 31%  backward 52%  optimizer 8%`.

    Args:
        steps: Seconds by phase, of each step; empty where they are not known (yet).
    """
    total: dict[str, float] = {}
    for phases in steps:
        for name, seconds in phases.items():
            if name not in BETWEEN_STEPS:
                total[name] = total.get(name, 0.0) + seconds
    whole = sum(total.values())
    # What rounds to nothing is not said; there are no shares of nothing.
    shares = {name: 100 * seconds / whole for name, seconds in total.items()} if whole else {}
    return "  ".join(
        f"{name.replace('_', ' ')} {share:.0f}%" for name, share in shares.items() if share >= 0.5
    )


def _by_domain(loss: dict[str, float]) -> str:
    return "  ".join(f"{domain} {value:.3f}" for domain, value in loss.items())


class Timer:
    """Seconds since the last call."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since construction or the last lap."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
