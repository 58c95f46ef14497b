"""A run's mixture on a terminal: who has how much when, and what is left. Read without colour, in 80 columns."""

from __future__ import annotations

from collections.abc import Mapping

from rich.padding import Padding
from rich.text import Text

from megatron_davinci.cli.screen import Screen, can_print
from megatron_davinci.config.units import format_tokens
from megatron_davinci.data.apportion import exact_weight
from megatron_davinci.data.journal import MixRecord
from megatron_davinci.train.course import Course, spans
from megatron_davinci.train.editing import Asked
from megatron_davinci.train.edits import Edit

_BARS = " ▁▂▃▄▅▆▇█"
_DIGITS = " .12345678"  # where the output has no blocks: eighths
_NARROWEST, _WIDEST = 24, 100
MANY = 4.0
"""Epochs beyond which repetition adds little (Muennighoff et al. 2023)."""


def show(course: Course) -> None:
    """Print the course of a mixture."""
    screen = Screen()
    length = course.schedule.sequence_length
    screen.facts([("run", str(course.past.directory.path)), ("now", _now(course))])
    _chart(course, screen)
    _changes(course, screen)
    rows = [
        [
            use.source,
            format_tokens(use.windows * length),
            format_tokens(use.given * length),
            _epochs(use.given, use.windows),
            format_tokens(use.left * length) if use.windows else "-",
            _epochs(use.planned, use.windows),
            _remark(use.given, use.planned, use.windows),
        ]
        for use in course.uses()
    ]
    screen.console.print()
    screen.table(
        "Sources, in tokens",
        [("source", "left"), ("has", "right"), ("gave", "right"), ("epochs", "right"), ("left", "right"),
         ("at end", "right"), ("", "left")],
        rows,
    )  # fmt: skip
    screen.console.print(
        Text("left: of the epoch that it is in. at end: epochs when the run is over.", "dim")
    )
    gone = [(edit, state) for edit, state, _ in course.edit_states() if state in _GONE]
    for edit, state in gone:
        why = course.past.edits.withdrawn.get(edit.name)
        said = f"{edit.name} ({edit.asked}) {_GONE[state]}" + (f": {why}" if why else "")
        screen.console.print(Text(screen.safe(said)))


def show_edit(asked: Asked, edit: Edit, *, written: bool) -> None:
    """Print what an edit changes."""
    screen = Screen()
    course, schedule = asked.before, asked.before.schedule
    plan = schedule.at(asked.sample)
    before = [record for record, _ in course.records if record.first_sample <= asked.sample][-1]
    until = next((record for record, _ in asked.after.records if record.first_sample > asked.sample), None)
    end = (
        "the run's end" if until is None else f"step {course.step_of(until.first_sample):,}, {_whose(until)}"
    )
    screen.facts(
        [
            ("edit", edit.name + ("" if written else ", as it would be")),
            (
                "from",
                f"step {plan.step:,} of stage {plan.stage_name} on: sample {asked.sample:,}, "
                f"{format_tokens(asked.sample * schedule.sequence_length)} tokens, "
                f"{asked.sample / course.total:.1%} of the run",
            ),
            ("until", end),
            ("reason", edit.reason),
        ]
    )
    now, then = {use.source: use for use in course.uses()}, asked.after.uses()
    names = [use.source for use in then if _percent(before.weights, use.source) + _percent(edit.weights, use.source)
             or use.planned != now[use.source].planned]  # fmt: skip
    screen.console.print()
    screen.table(
        "What changes",
        [("source", "left"), ("share", "right"), ("becomes", "right"), ("epochs at end", "right"),
         ("become", "right"), ("", "left")],
        [
            [
                use.source,
                f"{_percent(before.weights, use.source):.4g}%",
                f"{_percent(edit.weights, use.source):.4g}%",
                _epochs(now[use.source].planned, use.windows),
                _epochs(use.planned, use.windows),
                _remark(use.given, use.planned, use.windows),
            ]
            for use in then
            if use.source in names
        ],
    )  # fmt: skip
    if not written:
        screen.console.print("Nothing was written: this was --dry-run.")
    elif edit.point.sample is None and edit.point.stage is None:
        screen.console.print(
            "A run at work takes it up before its next step, else the next start does; the journal says where."
        )
    else:
        screen.console.print(
            "The run makes a record of it when it comes there, at work now or started later."
        )


_GONE = {
    "withdrawn": "was withdrawn",
    "replaced": "was replaced by a later edit before it took effect",
    "without effect": "has no step to take effect at",
}


def _now(course: Course) -> str:
    schedule = course.schedule
    done = course.now
    have, whole = (format_tokens(samples * schedule.sequence_length) for samples in (done, course.total))
    tokens = f"{have} of {whole} tokens"
    if done >= course.total:
        return f"at its end: {schedule.total_steps:,} steps, {tokens}"
    try:
        steps = schedule.at(done).step - 1
    except ValueError:
        return f"{tokens} ({done / course.total:.1%})"
    stage = schedule.at(done).stage_name
    return f"step {steps:,} of {schedule.total_steps:,}, {tokens} ({done / course.total:.1%}), stage {stage} next"


def _chart(course: Course, screen: Screen) -> None:
    """A row a source, a column a part of the run: as high as its share."""
    names = [use.source for use in course.uses() if use.planned]
    if not names:
        return
    label = min(max(len(name) for name in names), 16)
    width = max(_NARROWEST, min(_WIDEST, screen.console.width - label - 14))
    bars = _BARS if can_print(_BARS) else _DIGITS
    total, held = course.total, spans(course.records, course.total)
    screen.console.print()
    screen.console.print(Text("Share of each source over the run", "italic"))
    marks = [" "] * width
    for record, _ in course.records:
        if record.origin:
            marks[min(width - 1, record.first_sample * width // total)] = "*"
    stages = [" "] * width
    for number, stage in enumerate(course.config.curriculum):
        first = course.schedule.stage_first_sample(number)
        if first is not None:
            at = min(width - 1, first * width // total)
            for offset, letter in enumerate(f"|{screen.safe(stage.name)}"[: width - at]):
                stages[at + offset] = letter
    # A controller may have left hundreds of records, each of dozens of sources.
    shares = [(first, last, _percents(record.weights)) for first, last, record in held]
    for name in names:
        cells = []
        for column in range(width):
            begin, end = column * total / width, (column + 1) * total / width
            share = sum(
                (min(end, last) - max(begin, first)) * percent[name]
                for first, last, percent in shares
                if first < end and last > begin and name in percent
            ) / (100 * (end - begin))
            # What has a share shows, however small it is.
            cells.append(bars[max(1, round(share * (len(bars) - 1)))] if share else bars[0])
        was, becomes = (_percent(record.weights, name) for record in (held[0][2], held[-1][2]))
        line = Text(f"{screen.safe(name)[:label]:<{label}} ", no_wrap=True)
        line.append("".join(cells), "cyan")
        line.append(f" {was:.3g}% > {becomes:.3g}%"[:13])
        screen.console.print(line)
    here = min(width - 1, course.now * width // total)
    pad = " " * (label + 1)
    screen.console.print(Text(pad + "".join(stages).rstrip(), no_wrap=True))
    if any(mark != " " for mark in marks):
        screen.console.print(Text(pad + "".join(marks).rstrip() + "  * changed", no_wrap=True))
    words = "^ now, then planned"
    if here + len(words) > width:
        here, words = max(0, here - 4), "now ^"
    screen.console.print(Text(pad + " " * here + words, no_wrap=True))


def _changes(course: Course, screen: Screen) -> None:
    """The records: from where, by whom, what, and why."""
    screen.console.print()
    screen.console.print(Text("Mixtures", "italic"))
    before: MixRecord | None = None
    for record, number in course.records:
        state = "" if number is not None else " (planned)"
        head = (
            f"step {course.step_of(record.first_sample):,}, "
            f"{format_tokens(record.first_sample * course.schedule.sequence_length)} tokens, {_whose(record)}{state}"
        )
        line = Text("* " if record.origin else "| ")
        line.append(screen.safe(head), "bold")
        screen.console.print(line)
        for text in (_mixture(record.weights, before), record.reason):
            if text:
                screen.console.print(Padding(Text(screen.safe(text)), (0, 0, 0, 4), expand=False))
        before = record


def _whose(record: MixRecord) -> str:
    return f"{record.origin} in stage {record.stage}" if record.origin else f"stage {record.stage}"


def _mixture(weights: Mapping[str, str], before: MixRecord | None) -> str:
    parts = []
    shares = _percents(weights)
    earlier = _percents(before.weights) if before else shares
    for name in sorted({*shares, *earlier}):
        share, was = shares.get(name, 0.0), earlier.get(name, 0.0)
        if share or was:
            parts.append(
                f"{name} {share:.4g}%" + (f" ({share - was:+.3g})" if abs(share - was) > 5e-4 else "")
            )
    return ", ".join(parts)


def _percent(weights: Mapping[str, str], name: str) -> float:
    return _percents(weights).get(name, 0.0)


def _percents(weights: Mapping[str, str]) -> dict[str, float]:
    exact = {name: exact_weight(weight) for name, weight in weights.items()}
    whole = sum(exact.values())
    return {name: float(100 * weight / whole) for name, weight in exact.items()}


def _epochs(given: int, windows: int) -> str:
    return f"{given / windows:.2f}" if windows else "-"


def _remark(given: int, planned: int, windows: int) -> str:
    if not windows:
        return "no window"
    if not planned:
        return "not used"
    if planned > MANY * windows:
        return f"over {MANY:g} epochs"
    return "done" if planned == given else ""
