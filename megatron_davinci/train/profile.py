"""Traces of chosen steps by torch's profiler, as Chrome's trace viewer and Perfetto read them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from megatron_davinci.config.profile import ProfileConfig
from megatron_davinci.errors import ConfigError
from megatron_davinci.files import disk_errors, write_atomically
from megatron_davinci.platform.device import Platform
from megatron_davinci.train.phases import PhaseTimers

_TOP = 40


def check_profile(settings: ProfileConfig, ranks: int, total_steps: int) -> None:
    """Refuse what could never be profiled.

    Args:
        settings: What is asked for.
        ranks: Ranks of the run.
        total_steps: Steps of the whole curriculum.

    Raises:
        ConfigError: A step lies beyond the curriculum, or a rank is not there.
    """
    problems = []
    beyond = [str(step) for step in settings.steps if step > total_steps]
    if beyond:
        problems.append(f"profile.steps: {', '.join(beyond)}; the curriculum ends with step {total_steps}")
    missing = [str(rank) for rank in settings.ranks if rank >= ranks]
    if missing and settings.steps:
        problems.append(f"profile.ranks: {', '.join(missing)}; the last rank is {ranks - 1}")
    if problems:
        raise ConfigError(
            "What is to be profiled is not in this run.",
            where="profile",
            found="\n".join(problems),
            do="name steps and ranks of the run, from step 1 and rank 0 on",
        )


class StepProfiler:
    """Profiles the steps that the configuration names, on the ranks that it names.

    A trace begins one step early where there is one, so that starting the profiler is not in it.

    Args:
        settings: Which steps and ranks.
        folder: Where traces go: `step-XXXXXXXX/rank-N.trace.json.gz` by the first step, and `rank-N.ops.txt` with the
            operations that took longest.
        rank: This rank.
        platform: What the run computes on.
        timers: Their phases are named in the trace.
    """

    def __init__(
        self, settings: ProfileConfig, folder: Path, rank: int, platform: Platform, timers: PhaseTimers
    ) -> None:
        self._settings, self._folder, self._rank = settings, folder, rank
        self._platform, self._timers = platform, timers
        self._traces = settings.traces() if rank in settings.ranks else []
        self._running: torch.profiler.profile | None = None
        self._trace = (0, 0)

    def before(self, step: int) -> None:
        """Called before a step is taken; begins a trace where one is due."""
        if self._running is not None:
            return
        for first, last in self._traces:
            if first - 1 <= step <= last:
                self._begin(step, first, last)
                return

    def after(self, step: int) -> Path | None:
        """Called after a step was taken; ends a trace and returns its folder where one is through."""
        if self._running is None:
            return None
        if step < self._trace[1]:
            self._running.step()
            return None
        self._platform.synchronize()
        return self._end()

    def close(self) -> None:
        """End a trace that is not through, and leave it."""
        if self._running is not None:
            self._timers.annotate = False
            self._running.stop()
            self._running = None

    def _begin(self, step: int, first: int, last: int) -> None:
        activities = [ProfilerActivity.CPU]
        if self._platform.name == "cuda":
            activities.append(ProfilerActivity.CUDA)
        warmup = 1 if step < first else 0
        # A run that goes on in the middle of a trace has the rest of it.
        self._trace = (max(first, step), last)
        with warnings.catch_warnings():
            # The first step of a start has none before it to warm up in.
            warnings.simplefilter("ignore", UserWarning)
            schedule = torch.profiler.schedule(
                wait=0, warmup=warmup, active=last - self._trace[0] + 1, repeat=1
            )
        self._running = torch.profiler.profile(
            activities=activities,
            schedule=schedule,
            record_shapes=self._settings.shapes,
            profile_memory=self._settings.memory,
            with_stack=self._settings.stacks,
        )
        self._running.start()
        self._timers.annotate = True

    def _end(self) -> Path:
        assert self._running is not None
        finished, self._running = self._running, None
        self._timers.annotate = False
        finished.stop()
        self._traces = [trace for trace in self._traces if trace[1] != self._trace[1]]
        folder = self._folder / f"step-{self._trace[0]:08d}"
        name = f"rank-{self._rank}"
        with disk_errors(folder, "writing a trace"):
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f".{name}.partial.json.gz"
            finished.export_chrome_trace(str(partial))
            os.replace(partial, folder / f"{name}.trace.json.gz")
        by = "self_device_time_total" if self._platform.name == "cuda" else "self_cpu_time_total"
        table = finished.key_averages().table(sort_by=by, row_limit=_TOP, max_name_column_width=80)
        write_atomically(folder / f"{name}.ops.txt", table + "\n")
        return folder
