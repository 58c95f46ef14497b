"""The page of a corpus: how many documents each step left, what removed how much, and examples to judge rules by."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from megatron_davinci.darwin.catalogue import LEVELS
from megatron_davinci.darwin.corpus import Corpus
from megatron_davinci.darwin.page_models import add_models
from megatron_davinci.darwin.tally import NO_NUMBER, bin_edge
from megatron_davinci.report.axes import Axis
from megatron_davinci.report.numbers import percent, quantity
from megatron_davinci.report.page import Page
from megatron_davinci.report.plots import Bar, Bars, LinePlot, Plot, Series

# Seven colours for ten levels: from 7 on they come again, far from where they were.
_COLOURS = dict(enumerate("slate green blue violet sand wine vermillion slate green blue".split()))
_MOST_REASONS = 18
_KEPT, _DROPPED = "blue", "vermillion"


def write_corpus_report(corpus: Corpus) -> Path:
    """Write `report.html` into the corpus's folder, and return its path.

    Raises:
        DataError: The corpus's statistics are missing.
        EnvironmentProblem: The disk refused.
    """
    return corpus_page(corpus).write(corpus.folder / "report.html")


def corpus_page(corpus: Corpus) -> Page:
    """The page; nothing is written."""
    statistics = json.loads((corpus.folder / "statistics.json").read_text(encoding="utf-8"))
    counts, manifest = corpus.counts, corpus.manifest
    raw = manifest["input"]
    page = Page(
        manifest["name"],
        f"{raw['files']:,} files, {quantity(raw['bytes'])} bytes, {len(manifest['sources'])} sources",
    )
    _figures(page, counts, manifest)
    funnel = Funnel(manifest, statistics)
    _funnel(page, funnel)
    _reasons(page, counts)
    _sources(page, manifest)
    _counted(page, manifest, statistics)
    add_models(page, manifest, statistics)
    for plot in _histograms(statistics):
        if plot is not None:
            page.plot(plot)
    _found(page, counts, statistics)
    _examples(page, statistics, funnel)
    page.section("Operations", "All parameters; documents name them by hash.", collapsed=True)
    page.table(
        ["hash", "operation", "level", "model", "parameters"],
        [
            [
                each["parameters"],
                each["name"],
                each["level"],
                each.get("model", "–"),
                json.dumps(each["settings"]),
            ]
            for each in manifest["operations"]
        ],
    )
    return page


class Funnel:
    """Documents and characters before and after each step, in the recipe's order.

    Attributes:
        rows: `(step, level, documents in, documents out, characters that left with those turned away)`.
        made: Documents that a step made of others, by its name.
        read: Documents that were read.
    """

    def __init__(self, manifest: dict[str, Any], statistics: dict[str, Any]) -> None:
        gone: dict[str, Counter[str]] = {"documents": Counter(), "characters": Counter()}
        self.made = Counter[str]()
        for unit, counter in gone.items():
            for key, count in statistics[unit].items():
                _, what, *rest = key.split("/")
                if what in ("dropped", "quarantined"):
                    counter[rest[0]] += count
                elif what == "derived" and unit == "documents":
                    self.made[rest[0]] += count
        self.read = manifest["documents"]["input"]
        self.rows: list[tuple[str, int, int, int, int]] = []
        left, seen = self.read, set()
        for operation in manifest["operations"]:
            name = operation["name"]
            if name in seen:
                continue  # what one step takes in two places is counted together
            seen.add(name)
            out = left - gone["documents"][name] + self.made[name]
            self.rows.append((name, operation["level"], left, out, gone["characters"][name]))
            left = out


def _figures(page: Page, counts: dict[str, Any], manifest: dict[str, Any]) -> None:
    dropped, quarantined = (sum(counts[kind].values()) for kind in ("dropped", "quarantined"))
    units: Counter[str] = Counter()
    for source in manifest["sources"].values():
        for level in source["levels"].values():
            units.update(level)
    read = sum(source["input"]["characters"] for source in manifest["sources"].values())
    of = f"{percent(counts['output'] / max(1, counts['input']))} of {counts['input']:,}"
    if derived := counts.get("derived", 0):
        of = f"of {counts['input']:,} read and {derived:,} made of them"
    page.figures(
        [
            ("documents kept", f"{counts['output']:,}", of, _KEPT),
            ("characters kept", quantity(units["characters"]), f"of {quantity(read)}, markup included"),
            *(
                [("tokens", quantity(units["tokens"]), "by the recipe's tokenizer")]
                if "tokens" in units
                else []
            ),
            ("dropped", f"{dropped:,}", "with step and reason", _DROPPED),
            ("quarantined", f"{quarantined:,}", "could not be processed", "wine" if quarantined else ""),
            ("unaccounted for", "0", "input + derived = output + dropped + quarantined"),
        ]
    )


def _funnel(page: Page, funnel: Funnel) -> None:
    page.section(
        "Funnel",
        "How many documents are left after each step. Colours are levels: "
        + "; ".join(f"{level} {about.split(':')[0].split(',')[0]}" for level, about in LEVELS.items())
        + ".",
    )
    bars = [Bar(f"L{level} {name}", out, _COLOURS[level]) for name, level, _, out, _ in funnel.rows]
    page.plot(
        Bars(
            title="Documents left after each step",
            value=Axis("left", "documents", zero=True),
            bars=[Bar("read", funnel.read, "slate"), *bars],
            write=lambda value: f"{int(value):,}",
        )
    )
    page.table(
        ["step", "level", "documents in", "made of them", "turned away", "share", "characters turned away"],
        [
            [
                name,
                level,
                f"{into:,}",
                f"{funnel.made[name]:,}",
                f"{into + funnel.made[name] - out:,}",
                percent((into + funnel.made[name] - out) / max(1, into)),
                quantity(characters),
            ]
            for name, level, into, out, characters in funnel.rows
        ],
    )


def _reasons(page: Page, counts: dict[str, Any]) -> None:
    reasons = [
        (count, key, _DROPPED if kind == "dropped" else "wine")
        for kind in ("dropped", "quarantined")
        for key, count in counts[kind].items()
    ]
    if not reasons:
        return
    reasons.sort(key=lambda reason: (-reason[0], reason[1]))
    rest = sum(count for count, _, _ in reasons[_MOST_REASONS:])
    bars = [Bar(key.replace("/", ": ").replace("_", " "), count, colour) for count, key, colour in reasons]
    page.section("What removed how much")
    page.plot(
        Bars(
            title="Documents turned away, by step and reason",
            value=Axis("turned away", "documents", zero=True),
            bars=bars[:_MOST_REASONS] + ([Bar("all other reasons", rest, "slate")] if rest else []),
            write=lambda value: f"{int(value):,}",
        )
    )


def _counted(page: Page, manifest: dict[str, Any], statistics: dict[str, Any]) -> None:
    """What rules counted beside documents: marks by kind, characters taken out, licences found."""
    rules = {operation["name"] for operation in manifest["operations"] if operation["level"] <= 3}
    rows = [
        [step.replace("_", " "), what.replace("_", " "), f"{count:,}"]
        for (step, _, what), count in ((key.partition("/"), n) for key, n in statistics["counts"].items())
        if step in rules and "/" not in what
    ]
    if rows:
        page.section(
            "What rules changed and found", "Marks in the place of personal data, repeated text, licences."
        )
        page.table(["step", "what", "count"], rows)


def _sources(page: Page, manifest: dict[str, Any]) -> None:
    rows = []
    for name, source in manifest["sources"].items():
        given = source["input"]
        for level, kept in source["levels"].items() or [("–", {})]:
            rows.append(
                [
                    name,
                    level,
                    source["licence"] or "–",
                    f"{given['documents']:,}",
                    f"{kept.get('documents', 0):,}",
                    quantity(kept.get("characters", 0)),
                    quantity(kept["tokens"]) if "tokens" in kept else "–",
                ]
            )
    page.section("Sources and levels")
    page.table(["source", "level", "licence", "read", "kept", "characters kept", "tokens kept"], rows)
    languages: Counter[str] = Counter()
    for source in manifest["sources"].values():
        languages.update(source["languages"])
    if languages:
        total = sum(languages.values())
        page.table(
            ["language of kept documents", "documents", "share"],
            [[name, f"{count:,}", percent(count / total)] for name, count in languages.most_common(12)],
        )


def _histograms(statistics: dict[str, Any]) -> list[Plot | None]:
    histograms = statistics["histograms"]
    plots: list[Plot | None] = []
    if "length" in histograms:
        bins = {int(bin_): count for bin_, count in histograms["length"].items()}
        every = range(min(bins), max(bins) + 2)
        plots.append(
            LinePlot(
                title="Length of kept documents",
                x=Axis("length", "characters", log=True),
                y=Axis("kept", "documents", zero=True),
                series=[
                    Series(
                        name="",
                        x=[2 ** (bin_ - 1) if bin_ else 1 for bin_ in every],
                        y=[bins.get(bin_, 0) for bin_ in every],
                        colour=_KEPT,
                    )
                ],
                steps=True,
                half=True,
            )
        )
    scores: dict[str, dict[str, dict[int, int]]] = defaultdict(dict)
    for key, counts in histograms.items():
        if key.count("/") == 2:
            step, score, what = key.split("/")
            bins = {int(bin_): count for bin_, count in counts.items()}
            scores[f"{step}: {score}"][what] = {bin_: bins[bin_] for bin_ in bins if bin_ != NO_NUMBER}
    for title, by_fate in sorted(scores.items()):
        plots.append(_score_plot(title, by_fate))
    return plots


def _score_plot(title: str, by_fate: dict[str, dict[int, int]]) -> Plot | None:
    bins = sorted({bin_ for counts in by_fate.values() for bin_ in counts})
    if len(bins) < 2:
        return None
    every = list(range(bins[0], bins[-1] + 2))
    colours = {"kept": _KEPT, "dropped": _DROPPED}
    return LinePlot(
        title=title.replace("_", " "),
        x=Axis("score", ""),
        y=Axis("documents", "", zero=True),
        series=[
            Series(
                name=what,
                x=[bin_edge(bin_) for bin_ in every],
                y=[counts.get(bin_, 0) for bin_ in every],
                colour=colours[what],
            )
            for what, counts in sorted(by_fate.items(), reverse=True)
        ],
        steps=True,
        half=True,
    )


def _found(page: Page, counts: dict[str, Any], statistics: dict[str, Any]) -> None:
    """Duplicates and contamination, with whose they are."""
    rows = []
    for key, count in counts["dropped"].items():
        if key.split("/")[0] in ("exact_dedup", "minhash_dedup", "decontaminate"):
            for _, source, identifier, _, notes in statistics["examples"].get(f"dropped/{key}", []):
                said = ", ".join(f"{name} {value}" for name, value in (notes or {}).items())
                rows.append(
                    [key.replace("/", ": ").replace("_", " "), f"{count:,}", source, identifier, said]
                )
    if rows:
        page.section("Duplicates and contamination", "A few of each, and what each was held to be a copy of.")
        page.table(["what", "documents", "source", "document", "of"], rows)


def _examples(page: Page, statistics: dict[str, Any], funnel: Funnel) -> None:
    """Texts that were kept, and that each step turned away."""
    examples = statistics["examples"]
    page.section("Kept", "Drawn by the hash of their identifiers, so that nobody chose them.", collapsed=True)
    for _, _, identifier, text, _ in examples.get("kept", []):
        page.text_block(text, label=identifier)
    for name, level, *_ in funnel.rows:
        chosen = {
            what: found
            for what, found in examples.items()
            if what.split("/")[0] in ("dropped", "quarantined") and what.split("/")[1] == name
        }
        if not chosen:
            continue
        page.section(f"Turned away by {name}, level {level}", collapsed=True)
        for what, found in chosen.items():
            for _, _, identifier, text, notes in found:
                said = "; ".join(f"{key}: {value}" for key, value in (notes or {}).items())
                reason = what.split("/")[2].replace("_", " ")
                page.text_block(
                    text or "(no text)", label=f"{reason}: {identifier}" + (f" ({said})" if said else "")
                )
