"""`davinci data lineage | report`: a document's life, and a corpus's page."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_davinci.cli.screen import Screen
    from megatron_davinci.darwin.lineage import Event, Found

_LINES = 30  # of a difference that are shown
_WIDTH = 160  # characters of a line


def _text(content: str, **style: Any) -> Any:
    # `davinci data --help` is to import nothing that takes time.
    from rich.text import Text

    return Text(content, **style)


def add_actions(actions: Any) -> None:
    """Declare the actions' arguments.

    Args:
        actions: The sub-parsers of `davinci data`.
    """
    lineage = actions.add_parser(
        "lineage", help="tell a document's life: its raw file, and what each step did"
    )
    lineage.add_argument("document", help="the document's identifier, as the field `id` has it")
    lineage.add_argument(
        "--corpus",
        type=Path,
        default=Path(),
        help="the corpus, or a folder with corpora (default: this one)",
    )
    lineage.add_argument("--full", action="store_true", help="all of each difference, not its beginning")
    lineage.add_argument("--json", action="store_true", help="the same as JSON")
    report = actions.add_parser("report", help="draw a corpus's page: funnel, histograms, examples")
    report.add_argument("corpus", type=Path, help="the corpus's folder")


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen action."""
    return ACTIONS[arguments.action](arguments)


def draw_report(arguments: argparse.Namespace) -> int:
    """Write CORPUS/report.html."""
    from megatron_davinci.darwin.corpus import Corpus
    from megatron_davinci.darwin.page import write_corpus_report

    print(write_corpus_report(Corpus.load(arguments.corpus)))
    return 0


def tell_lineage(arguments: argparse.Namespace) -> int:
    """Find the document, and tell its life."""
    from megatron_davinci.darwin.lineage import events, find, find_corpora

    found = find(find_corpora(arguments.corpus), arguments.document)
    life = list(events(found))
    if arguments.json:
        print(json.dumps(_plain(found, life), indent=2, ensure_ascii=False))
        return 0
    from megatron_davinci.cli.screen import Screen

    show(Screen(), found, life, full=arguments.full)
    return 0


def _plain(found: Found, life: list[Event]) -> dict[str, Any]:
    record = {key: value for key, value in found.record.items() if key != "text"}
    return {
        "corpus": str(found.corpus.folder),
        "file": str(found.path),
        "kind": found.kind,
        "record": record,
        "operations": [event._asdict() for event in life],
    }


def show(screen: Screen, found: Found, life: list[Event], *, full: bool) -> None:
    """Print facts, then the operations in order, each change as a difference in colour."""
    record, origin = found.record, found.record["darwin"]["origin"]
    if "bytes" in origin:
        place = f"bytes {origin['first']:,} to {origin['first'] + origin['bytes']:,}"
    else:
        place = f"row {origin['row']:,}" if "row" in origin else ""
    if "row" in origin and "bytes" in origin:
        place = f"row {origin['row']:,}, {place}"
    fate = record.get("fate")
    became = f"{fate['kind']} by {fate['step']}: {fate['reason']}" if fate else "kept"
    screen.facts(
        [
            ("document", record["id"]),
            ("became", became),
            ("level", str(record["darwin"]["level"])),
            ("source", record["source"]),
            ("licence", record["licence"] or "–"),
            ("raw", f"{origin['path']}" + (f", {place}" if place else "")),
            ("in", str(found.path)),
        ]
    )
    for number, event in enumerate(life, start=1):
        _show_event(screen, number, event, full)


def _show_event(screen: Screen, number: int, event: Event, full: bool) -> None:
    entry = event.entry
    head = _text(f"\n{number:>2}  L{entry['level']} ", style="bold")
    head.append(screen.safe(entry["name"]), style="bold")
    colour = {"changed": "yellow", "dropped": "red", "quarantined": "red"}.get(entry["result"], "green")
    head.append(f"  {entry['result']}", style=colour)
    if "reason" in entry:
        head.append(f": {screen.safe(entry['reason'])}", style=colour)
    screen.console.print(head)
    said = [f"{name} {value:g}" for name, value in entry.get("scores", {}).items()]
    said += [f"{name}: {value}" for name, value in (entry.get("notes") or {}).items()]
    said += [entry["model"]] if "model" in entry else []
    if "characters" in entry:
        said.append(f"{entry['characters']:,} characters")
    if said:
        screen.console.print(_text("    " + screen.safe("; ".join(said)), style="dim"))
    if event.trouble:
        screen.console.print(_text(f"    cannot be shown: {screen.safe(event.trouble)}", style="yellow"))
    if event.before is not None and event.after is not None:
        _show_difference(screen, event.before, event.after, full)


def _show_difference(screen: Screen, before: str, after: str, full: bool) -> None:
    lines = [
        line
        for line in difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=1)
        if not line.startswith(("---", "+++"))
    ]
    shown = lines
    if not full and len(lines) > _LINES:
        taken = [line for line in lines if line.startswith("-")]
        added = [line for line in lines if line.startswith("+")]
        if len(taken) + len(added) + 8 > len(lines):  # little is left as it was: how both begin says more
            shown = [*taken[: _LINES // 4], *added[: _LINES // 2]]
        else:
            shown = lines[:_LINES]
    for line in shown:
        style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "dim")
        body = line if full or len(line) <= _WIDTH else line[:_WIDTH] + " …"
        # Tabs are shown as they look; a carriage return or a control character must be seen.
        screen.console.print(_text("    " + screen.safe(body.expandtabs(4)), style=style), soft_wrap=True)
    if not lines:
        screen.console.print(_text("    only how the last line ends", style="dim"))
    if len(lines) > len(shown):
        rest = f"    … {len(lines) - len(shown):,} more lines; --full shows them"
        screen.console.print(_text(rest, style="dim"))


ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {"lineage": tell_lineage, "report": draw_report}
