"""What the doctor has found, on a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.padding import Padding
from rich.text import Text

from megatron_davinci.cli.screen import Screen
from megatron_davinci.config.units import format_tokens
from megatron_davinci.train.post_mortem import PostMortem, RankEnd

_COLORS = {"complete": "green", "at work": "green", "asked to end": "cyan", "not begun": "cyan"}
_MOST = 8  # lines of a list


def show(found: PostMortem) -> None:
    """Print it: what happened, where the run stands, how its ranks ended, what to do."""
    screen = Screen()
    console = screen.console
    head = Text(f"{found.run}: ")
    head.append(found.state, style=f"bold {_COLORS.get(found.state, 'red')}")
    console.print(head)
    for line in found.cause:
        console.print(Padding(Text(screen.safe(line)), (0, 0, 0, 2), expand=False))
    console.print()
    screen.facts(list(_facts(found)))
    if found.state != "complete" and len({rank.state for rank in found.ranks} - {"at work"}):
        console.print()
        screen.table(
            "Ranks of the last start",
            [("ranks", "left"), ("on", "left"), ("ended", "left"), ("in their words", "left")],
            list(_groups(found.ranks)),
        )
    if found.events:
        console.print()
        screen.table(
            "Steps that were in trouble, the latest",
            [("step", "right"), ("what", "left"), ("done", "left"), ("where", "left")],
            [
                [f"{event['step']:,}", f"{event['kind']}: {event['found']}", event["action"], _where(event)]
                for event in found.events
            ],
        )
    if found.do:
        console.print()
        console.print(Text("To do", style="bold"))
        for number, line in enumerate(found.do, start=1):
            console.print(Padding(Text(f"{number}. {screen.safe(line)}"), (0, 0, 0, 2), expand=False))


def _facts(found: PostMortem) -> Iterator[tuple[str, str]]:
    last = found.last
    if last:
        of = f" of {found.steps:,} ({100 * found.step / found.steps:.1f}%)" if found.steps else ""
        yield "last step", f"{found.step:,}{of}, {_ago(found.age)}"
        yield (
            "",
            f"stage {last.get('stage')}, loss {last.get('loss', float('nan')):.4f}, gradient norm "
            f"{last.get('grad_norm', float('nan')):.3g}, {format_tokens(last.get('consumed_tokens', 0))} tokens",
        )
    if found.start:
        start = found.start
        yield (
            "last start",
            f"number {found.starts}, {start.get('time')}, after step {start.get('step', 0):,}: "
            f"{start.get('layout')}, {start.get('device')}",
        )
    yield "goes on from", _newest(found)
    lost = found.step - (found.newest_good.step if found.newest_good else 0)
    if lost > 0 and found.state not in ("complete", "at work"):
        yield "", f"{lost:,} step{'s' if lost > 1 else ''} after it will be taken again"
    if found.in_memory is not None and found.state not in ("complete", "at work"):
        held = found.in_memory
        yield "or from memory", f"step {held.step:,}: ranks {_runs(held.ranks)} on this machine, not verified"
    yield from _listed("damaged", found.damaged)
    yield from _listed(
        "unfinished",
        [f"{name}: {_size(size)} of a save; the next one takes it away" for name, size in found.left_over],
    )
    yield from _listed("put aside", found.aside)
    if found.passed_over:
        yield (
            "passed over",
            f"{found.passed_over} range{'s' if found.passed_over > 1 else ''} of samples (journal.jsonl)",
        )
    yield from _listed(
        "not saved",
        [
            f"step {line.get('step'):,}: {str(line.get('error')).splitlines()[0]}"
            for line in found.failed_saves
        ],
    )


def _newest(found: PostMortem) -> str:
    good = found.newest_good
    if good is None:
        return "nothing: no checkpoint is good" if found.damaged else "nothing: no checkpoint was saved"
    size = sum(entry["bytes"] for entry in good.manifest["files"].values())
    verified = "every byte verified" if found.verified else "not verified"
    return f"step {good.step:,}: {good.folder.name}, {_size(size)}, {verified}"


def _size(count: int) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} bytes"


def _listed(name: str, lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines[:_MOST]):
        yield name if not number else "", line
    if len(lines) > _MOST:
        yield "", f"and {len(lines) - _MOST} more"


def _groups(ranks: Sequence[RankEnd]) -> Iterator[list[str]]:
    """Ranks that ended alike, together."""
    groups: dict[tuple[str, str], list[RankEnd]] = {}
    for rank in ranks:
        # What a rank says differs from another's by its own name only.
        words = rank.reason.strip().splitlines()
        said = (words[-1] if rank.code == 1 else words[0]) if words else ""
        groups.setdefault((_ended(rank), said), []).append(rank)
    for (ended, said), members in sorted(groups.items(), key=lambda item: item[1][0].rank):
        hosts = list(dict.fromkeys(rank.host for rank in members if rank.host))
        on = hosts[0] if hosts else ""
        on += f" and {len(hosts) - 1} more" if len(hosts) > 1 else ""
        yield [_runs([rank.rank for rank in members]), on or "-", ended, said or "-"]


def _ended(rank: RankEnd) -> str:
    if rank.state == "ended":
        return f"code {rank.code}" + (f", {rank.kind}" if rank.kind else "")
    if rank.state == "gone" and rank.code is not None and rank.code < 0:
        return f"by signal {-rank.code}"
    return {"gone": "without a word", "at work": "at work", "unknown": "nothing on record"}[rank.state]


def _runs(numbers: Sequence[int]) -> str:
    """`0-3, 6` for 0, 1, 2, 3, 6."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    said = ", ".join("-".join(map(str, part)) for part in parts[:6])
    return said + (f" and {len(parts) - 6} more" if len(parts) > 6 else "")


def _where(event: dict[str, Any]) -> str:
    parts = []
    for rank in event.get("ranks", ())[:2]:
        samples = rank.get("samples", ())
        of = f" of {rank['source']}" if rank.get("source") else ""
        more = f" and {len(samples) - 1} more" if len(samples) > 1 else ""
        found = [f"sample {samples[0]:,}{more}{of}"] if samples else []
        found += [f"weights {rank['weights'][0]}"] if rank.get("weights") else []
        found += [f"output of {rank['module']}"] if rank.get("module") else []
        found += [f"gradient of {rank['gradients'][0]}"] if rank.get("gradients") and not found else []
        parts.append(f"rank {rank['rank']}: " + ", ".join(found))
    return "; ".join(parts) or f"samples {event['samples'][0]:,} to {event['samples'][1]:,}"


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return "at an unknown time"
    for size, name in ((86400.0, "day"), (3600.0, "hour"), (60.0, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return f"{int(seconds)} s ago"


def as_json(found: PostMortem) -> dict[str, Any]:
    """All of it, for programs."""
    good = found.newest_good
    return {
        "run": str(found.run),
        "state": found.state,
        "cause": found.cause,
        "exit_code": found.code,
        "do": found.do,
        "step": found.step,
        "steps": found.steps,
        "until": found.until,
        "last": found.last,
        "seconds_since_last_step": None if found.age is None else round(found.age, 1),
        "starts": found.starts,
        "last_start": found.start,
        "newest_good": None
        if good is None
        else {
            "step": good.step,
            "folder": str(good.folder),
            "consumed_samples": good.consumed_samples,
            "verified": found.verified,
        },
        "in_memory": None if found.in_memory is None else vars(found.in_memory),
        "damaged": found.damaged,
        "unfinished": [{"folder": name, "bytes": size} for name, size in found.left_over],
        "put_aside": found.aside,
        "passed_over": found.passed_over,
        "events": found.events,
        "failed_saves": found.failed_saves,
        "ranks": [vars(rank) for rank in found.ranks],
    }
