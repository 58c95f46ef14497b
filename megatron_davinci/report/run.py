"""The page of one run: `report.html`, its plots as PNG, and one picture of the four that matter most."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_davinci.errors import DataError
from megatron_davinci.files import write_atomically
from megatron_davinci.report import phase_plots, precision_plots, run_plots, run_tasks
from megatron_davinci.report.numbers import NOTHING, duration, number, percent, quantity, scientific
from megatron_davinci.report.page import KeyFigure, Page
from megatron_davinci.report.plots import Plot, grid_png
from megatron_davinci.report.run_files import RECORD, is_run, read_run
from megatron_davinci.report.run_metrics import as_number
from megatron_davinci.report.run_story import RunStory


def write_run_report(
    run_dir: Path, worth: run_tasks.Worth | None = None, findings: Sequence[run_tasks.Finding] = ()
) -> Path:
    """Write `report.html`, `report.png` and `plots/*.png` into a run directory, from the files that are in it.

    Works for a run that is still going or was stopped: what is missing is said on the page. The same files
    give the same bytes. Each file is written whole or not at all.

    Args:
        run_dir: The run directory.
        worth: Of a benchmark's trajectory, its signal over its noise; None to leave that out.
        findings: What else is known of what was measured.

    Returns:
        The path of `report.html`.

    Raises:
        DataError: There is no such folder, or it is not that of a run.
        EnvironmentProblem: The disk refused.
    """
    run_dir = Path(run_dir)
    if run_dir.is_dir() and not is_run(run_dir):
        runs = sorted(one.name for one in run_dir.iterdir() if one.is_dir() and is_run(one))
        raise DataError(
            "The folder is not that of a run; nothing was written to it.",
            where=run_dir,
            found=f"runs in it: {', '.join(runs[:9])}" if runs else f"none of {', '.join(RECORD)}",
            expected="a run directory, with metrics.jsonl and config.yaml in it",
            do="Give one of them." if runs else "Give the folder that `davinci train` wrote.",
        )
    story = RunStory(read_run(run_dir))
    page, plots = run_page(story, worth, findings)
    for plot in plots:
        write_atomically(run_dir / "plots" / f"{_slug(plot.title)}.png", plot.png())
    main = run_plots.overview_plots(story)
    if main:
        heading = f"{story.files.name}: {quantity(story.consumed_tokens)} tokens"
        write_atomically(run_dir / "report.png", grid_png(main, columns=min(2, len(main)), heading=heading))
    return page.write(run_dir / "report.html")


def run_page(
    story: RunStory, worth: run_tasks.Worth | None = None, findings: Sequence[run_tasks.Finding] = ()
) -> tuple[Page, list[Plot]]:
    """The page of a run and the plots that are on it; nothing is written."""
    page = Page(story.files.name, _subtitle(story))
    _key_figures(page, story)
    _notices(page, story)
    return page, _sections(page, story, worth, findings)


def _subtitle(story: RunStory) -> str:
    manifest = story.files.manifest
    platform = _mapping(manifest.get("platform"))
    ranks = platform.get("ranks")
    parts = [
        re.sub(
            r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d).*(?:Z|\+00:00)$",
            r"\1 \2 UTC",
            str(manifest.get("created") or ""),
        ),
        str(platform.get("device") or ""),
        f"{ranks} rank{'' if ranks == 1 else 's'}" if ranks else "",
        _inline(platform.get("layout")),
    ]
    return " · ".join(part for part in parts if part)


def _key_figures(page: Page, story: RunStory) -> None:
    model = _mapping(story.files.manifest.get("model"))
    speed = story.metrics["tokens_per_second"]
    peak = story.metrics["flops_utilization"]
    shape = [
        f"{model[key]} {name}"
        for key, name in (("num_layers", "layers"), ("hidden_size", "wide"))
        if model.get(key)
    ]
    steps = len(story.metrics)
    page.figures(
        [
            KeyFigure(
                "Tokens",
                quantity(as_number(story.files.summary.get("tokens", story.consumed_tokens))),
                f"{steps:,} step{'' if steps == 1 else 's'}",
            ),
            KeyFigure("Parameters", quantity(as_number(model.get("parameters"))), ", ".join(shape)),
            KeyFigure(
                "Wall time" if story.is_timed else "Time in steps", duration(story.seconds), _rate(story)
            ),
            KeyFigure(
                "Tokens per second",
                quantity(_median(speed)),
                f"median; {percent(_median(peak), 2)} of the matmul peak"
                if np.isfinite(peak).any()
                else "median",
            ),
        ]
    )
    page.figures(
        [
            KeyFigure(
                f"Held-out loss, {domain}",
                f"{story.final_loss[domain]:.3f}",
                _said_of_loss(story, domain),
                story.colours[domain],
            )
            for domain in story.domains
            if domain in story.final_loss
        ]
    )


def _rate(story: RunStory) -> str:
    seconds = story.metrics["seconds"]
    return f"{duration(_median(seconds))} a step, median" if np.isfinite(seconds).any() else ""


def _said_of_loss(story: RunStory, domain: str) -> str:
    said = _against_bigram(story.final_loss[domain], story.bigram_loss.get(domain))
    bits = story.final_bits.get(domain)
    return said if bits is None else f"{said}; {bits:.3f} bits per byte"


def _against_bigram(loss: float, bigram: float | None) -> str:
    if bigram is None:
        return "nats per token"
    difference = bigram - loss
    return f"{abs(difference):.2f} nats {'below' if difference >= 0 else 'above'} the bigram model ({bigram:.2f})"


def _notices(page: Page, story: RunStory) -> None:
    if not len(story.metrics):
        page.notice("No step has been recorded yet.")
    elif not (story.files.summary or story.consumed_tokens >= (planned := story.files.planned_tokens)):
        of = f" of {quantity(planned)}" if np.isfinite(planned) else ""
        page.notice(
            "The steps behind the last one were passed over; journal.jsonl says why. The run is at its end."
            if story.files.reached_samples() * story.files.sequence_length >= planned
            else f"It has taken {quantity(story.consumed_tokens)}{of} tokens: the run is still going, or was stopped "
            "before its end."
        )
    for what, column in (("loss", "loss"), ("gradient norm", "grad_norm")):
        values = story.metrics[column]
        # A column that was never recorded is missing, not infinite.
        bad = (
            np.flatnonzero(~np.isfinite(values)) if np.isfinite(values).any() else np.empty(0, dtype=np.int64)
        )
        if len(bad):
            steps = "1 step has" if len(bad) == 1 else f"{len(bad):,} steps have"
            page.notice(f"{steps} no finite {what}, the first is step {story.metrics.step[bad[0]]:,}.")


def _sections(
    page: Page, story: RunStory, worth: run_tasks.Worth | None, findings: Sequence[run_tasks.Finding]
) -> list[Plot]:
    """Add every section that the run's files allow; returns the plots on the page."""
    steps = len(story.metrics)
    window = run_plots.smoothing_window(steps)
    smoothed = (
        f"Each step faint, the mean over {window} steps strong." if steps >= run_plots.SMOOTH_FROM else ""
    )
    shown: list[Plot] = []

    def add(title: str, text: str, *entries: tuple[Plot | None, str]) -> None:
        there = [(plot, caption) for plot, caption in entries if plot is not None]
        if there:
            page.section(title, text)
        for plot, caption in there:
            page.plot(plot, caption)
            shown.append(plot)

    heldout = run_plots.heldout_plot(story)
    add(
        "Held-out loss",
        "",
        (heldout, "Loss on text that is never trained on, by domain. Lower is better."),
        (
            run_plots.domain_loss_plot(story),
            f"Loss on what is trained on, by domain: the mean over {window} steps by the weights of the labels, "
            "which does not reach across stages.",
        ),
        (run_plots.final_loss_plot(story), ""),
        (run_plots.domain_tokens_plot(story), ""),
    )
    tasks = run_tasks.read_tasks(story.files.directory)
    if tasks:
        plots = run_tasks.task_plots(tasks, story.stage_ranges)
        page.section("Benchmarks", "What the model was asked, by davinci eval or in training.")
        for plot in plots:
            page.plot(plot, "")
            shown.append(plot)
        page.table(*run_tasks.task_table(tasks, worth))
    for finding in findings:
        page.section(finding.title, finding.text)
        if finding.rows:
            page.table(finding.headers, finding.rows)
    add(
        "Training loss",
        "",
        (run_plots.loss_plot(story), smoothed and smoothed + " The mean does not reach across stages."),
    )
    add(
        "Mixture",
        "",
        (run_plots.mixture_plot(story), "The share of each domain in the samples, from the mixture journal."),
    )
    if story.files.proposals:
        page.section("The controller", *_controller_text(story))
        page.table(*_controller_table(story))
    if story.stages:
        page.section("Stages")
        page.table(*_stage_table(story))
    add(
        "Schedule",
        "",
        (run_plots.learning_rate_plot(story), ""),
        (run_plots.batch_size_plot(story), ""),
    )
    add(
        "Speed and stability",
        smoothed,
        (run_plots.throughput_plot(story), ""),
        (run_plots.grad_norm_plot(story), ""),
    )
    headers, rows = precision_plots.lost_table(story)
    if rows:
        add(
            "Low precision",
            precision_plots.CAPTION,
            (precision_plots.lost_plot(story, "underflow"), ""),
            (precision_plots.lost_plot(story, "overflow"), ""),
        )
        page.table(headers, rows, "The last step that was watched: where most is lost.")
    add(
        "Beside another precision",
        "A sharpness that rises says before the loss does that bits are too few (arXiv 2405.18710).",
        (precision_plots.now_and_then_plot(story, "logit_sharpness"), ""),
        (precision_plots.now_and_then_plot(story, "reference_gap"), ""),
    )
    add(
        "Where the time goes",
        "",
        (phase_plots.phases_plot(story), phase_plots.PHASES_CAPTION),
        (phase_plots.phase_seconds_plot(story), phase_plots.seconds_caption(story)),
    )
    if story.files.samples:
        page.section("Samples", "What the model writes on from a prompt (in grey), as it came out.")
        for sample in story.files.samples:
            page.text_block(sample["text"], label=sample["domain"], lead=sample["prompt"])
    _missing(page, story)
    _record(page, story)
    return shown


_DECISIONS = 20
"""As many as the page has a row for: the last."""


def _controller_text(story: RunStory) -> list[str]:
    last, count = story.files.proposals[-1], len(story.files.proposals)
    kept = "The last is below." if count == 1 else f"The last {min(count, _DECISIONS)} are below."
    done = "applied" if last.mode == "apply" else "advice: training went on as planned"
    return [f"Policy {last.policy}, {done}. {count} decision{'' if count == 1 else 's'}. {kept}"]


def _controller_table(story: RunStory) -> tuple[list[str], list[list[str]]]:
    rows = []
    for proposal in story.files.proposals[-_DECISIONS:]:
        moves = [
            f"{unit} {percent(proposal.present.get(unit, 0.0), 1)} → {percent(share, 1)}"
            for unit, share in proposal.mixture.items()
            if share != proposal.present.get(unit)
        ]
        rows.append([quantity(proposal.consumed_tokens), ", ".join(moves) or "as it is", proposal.reason])
    return ["Tokens", "Shares", "Why"], rows


def _stage_table(story: RunStory) -> tuple[list[str], list[list[str]]]:
    rows = []
    for stage in story.stages:
        part = slice(stage.first, stage.last + 1)
        rows.append(
            [
                stage.name or NOTHING,
                quantity(stage.end - stage.start),
                f"{stage.last - stage.first + 1:,}",
                _change(story.metrics["global_batch_size"][part], lambda value: f"{value:,.0f}"),
                _change(story.metrics["learning_rate"][part], scientific),
                _end_loss(story.metrics["loss"][part]),
                ", ".join(f"{name} {percent(share)}" for name, share in stage.mixture.items()) or NOTHING,
            ]
        )
    return [
        "Stage",
        "Tokens",
        "Steps",
        "Batch, sequences",
        "Learning rate",
        "Loss at its end",
        "Mixture",
    ], rows


def _change(values: Any, write: Any) -> str:
    known = values[np.isfinite(values)]
    if not len(known):
        return NOTHING
    first, last = write(float(known[0])), write(float(known[-1]))
    return first if first == last else f"{first} → {last}"


def _end_loss(loss: Any) -> str:
    """The mean of the last fiftieth of a stage, at least one step."""
    known = loss[np.isfinite(loss)]
    return f"{known[-max(1, len(known) // 50) :].mean():.3f}" if len(known) else NOTHING


def _missing(page: Page, story: RunStory) -> None:
    files = story.files
    lines = [f"{problem}" for problem in files.problems]
    if files.mixes and not np.isfinite(files.sequence_length):
        lines.append("The sequence length is not known, so the journal cannot be set against tokens.")
    if lines:
        page.section("What is missing", "\n\n".join(lines))


def _record(page: Page, story: RunStory) -> None:
    manifest, platform = story.files.manifest, _mapping(story.files.manifest.get("platform"))
    rows = [["seed", _inline(manifest.get("seed"))], ["davinci", _inline(manifest.get("davinci_version"))]]
    rows += [[name, _inline(version)] for name, version in sorted(_mapping(manifest.get("packages")).items())]
    rows += [[f"platform: {name}", _inline(value)] for name, value in platform.items()]
    rows += [[f"model: {name}", _inline(value)] for name, value in _mapping(manifest.get("model")).items()]
    prints = sorted(_mapping(manifest.get("data_fingerprints")).items())
    rows += [[f"data: {source}", _inline(value)] for source, value in prints]
    if manifest:
        page.section(
            "Record", "What decided this run; config.yaml beside this page has every setting.", collapsed=True
        )
        page.table(["What", "Value"], rows)


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _inline(value: object) -> str:
    """A value of the manifest on one line: "tensor 2, data 4" for a mapping."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return number(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _median(values: Any) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else float("nan")


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
