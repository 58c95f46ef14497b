"""The answers of `davinci data inspect` as a page."""

from __future__ import annotations

from typing import Any

from megatron_davinci.cli.data_inspect_run import MANY
from megatron_davinci.cli.data_inspect_sample import Span, from_values, shown
from megatron_davinci.cli.data_inspect_screen import bin_name, epochs, flag, heading, lengths, share
from megatron_davinci.config.units import format_tokens
from megatron_davinci.report.axes import Axis
from megatron_davinci.report.colors import assign
from megatron_davinci.report.page import KeyFigure, Page
from megatron_davinci.report.plots import Bar, Bars

Answer = dict[str, Any]


def page(answer: Answer) -> Page:
    """The page of an answer.

    Args:
        answer: Of `inspect_source` or `inspect_run`.
    """
    run = answer["run"]
    of = run["directory"] if run else answer["sources"][0]["name"]
    made = Page(f"Data of {of}", answer["target"])
    made.figures(_run_figures(answer) if run else _source_figures(answer["sources"][0]))
    for problem in answer["problems"]:
        made.notice(problem)
    for note in answer["notes"]:
        made.notice(note)
    colours = assign(one["domain"] for one in answer["sources"])
    _holdings(made, "Sources", answer["sources"])
    if run:
        _epochs(made, answer, colours)
        if answer["validation"]:
            _holdings(made, "Held out", answer["validation"])
    _lengths(made, answer, colours)
    if answer["samples"]:
        _samples(made, answer)
    return made


def _source_figures(source: Answer) -> list[KeyFigure]:
    windows = source["windows"]
    return [
        KeyFigure("tokens", format_tokens(source["tokens"]), f"{source['tokens']:,} of {source['dtype']}"),
        KeyFigure("documents", f"{source['documents']:,}", f"in {source['shards']:,} shards"),
        KeyFigure(
            "windows",
            f"{windows['number']:,}",
            f"of {windows['sequence_length']:,} tokens; {windows['lost_tokens']:,} tokens are in none",
        ),
        KeyFigure("tokens that carry loss", share(source) if source["has_mask"] else "all"),
    ]


def _run_figures(answer: Answer) -> list[KeyFigure]:
    run, counted = answer["run"], [one for one in answer["sources"] if one["counted"]]
    return [
        KeyFigure("tokens of the run", format_tokens(run["tokens"]), f"{run['steps']:,} steps"),
        KeyFigure("samples", f"{run['samples']:,}", f"of {run['sequence_length']:,} tokens"),
        KeyFigure("sources", f"{len(answer['sources']):,}", f"{len(counted):,} readable"),
        KeyFigure("tokens of the sources", format_tokens(sum(one["tokens"] for one in counted))),
    ]


def _holdings(made: Page, title: str, sources: list[Answer]) -> None:
    rows = []
    for one in sources:
        if not one.get("counted", True):
            rows.append([one["domain"], one["name"], *["–"] * 5, "damaged", one["place"]])
            continue
        rows.append(
            [
                one["domain"],
                one["name"],
                f"{one['tokens']:,}",
                f"{one['documents']:,}",
                f"{one['windows']['number']:,}",
                share(one) if one["has_mask"] else "all",
                "–" if one["eod_id"] is None else str(one["eod_id"]),
                (one["tokenizer_sha256"] or "unknown")[:16],
                one["place"],
            ]
        )
    headers = ["domain", "source", "tokens", "documents", "windows", "loss", "EOD", "tokenizer", "place"]
    made.section(title).table(headers, rows)


def _epochs(made: Page, answer: Answer, colours: dict[str, str]) -> None:
    sources, stages = answer["sources"], answer["stages"]
    known = [one for one in sources if one["use"]["total_epochs"] is not None]
    many = any(flag(one["use"]).startswith("over") for one in known)
    made.section(
        "Epochs",
        "How often the run passes through each source. Up to about four passes, repeated text is nearly as good "
        "as new (Muennighoff et al. 2023, arXiv:2305.16264).",
    ).plot(
        Bars(
            title="Epochs of each source",
            value=Axis("in the whole run", "epochs", zero=True),
            note=f"mark: {MANY} epochs" if many else "",
            write=lambda value: f"{value:,.2f}",
            bars=[
                Bar(
                    one["name"],
                    one["use"]["total_epochs"],
                    colours[one["domain"]],
                    reference=float(MANY) if many else None,
                )
                for one in known
            ],
        )
    ).table(
        ["source", *(stage["name"] for stage in stages), "total", ""],
        [
            [
                one["name"],
                *(epochs(one["use"], i) for i in range(len(stages))),
                epochs(one["use"]),
                flag(one["use"]),
            ]
            for one in sources
        ],
    )
    made.section("Stages").table(
        ["stage", "steps", "samples", "tokens"],
        [[one["name"], f"{one['steps']:,}", f"{one['samples']:,}", f"{one['tokens']:,}"] for one in stages],
    )


def _lengths(made: Page, answer: Answer, colours: dict[str, str]) -> None:
    made.section("Document lengths", "Documents by their number of tokens, in powers of two.")
    sources = [one for one in answer["sources"] if one.get("counted", True) and one["read"]["histogram"]]
    for one in sources:
        read = one["read"]
        sample = f" A sample: {read['shards']:,} of {one['shards']:,} shards." if read["is_sample"] else ""
        made.plot(
            Bars(
                title=f"Documents of {one['name']}",
                half=len(sources) > 1,
                value=Axis("documents", "documents", zero=True),
                bars=[
                    Bar(bin_name(row), float(row["documents"]), colours[one["domain"]])
                    for row in read["histogram"]
                ],
                write=lambda value: f"{int(value):,}",
            ),
            f"Lengths: {lengths(one)}.{sample}",
        )


def _samples(made: Page, answer: Answer) -> None:
    made.section(
        "Samples", "Grey: no loss. On a tint: every other document. ⏎EOD: a token that ends a document."
    )
    for sample in answer["samples"]:
        parts = [] if sample["spans"] is None else from_values(sample["spans"])
        made.marked_text([(shown(span), _marks(span)) for span in parts], label=heading(sample))


def _marks(span: Span) -> str:
    marks = [
        "quiet" if not span.loss else "",
        "other" if span.document % 2 else "",
        {"end": "end", "bound": "end", "gap": "aside", "edge": "aside"}.get(span.kind, ""),
    ]
    return " ".join(mark for mark in marks if mark)
