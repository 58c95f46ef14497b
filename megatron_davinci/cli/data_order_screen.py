"""The answers of `davinci data order` on a screen: plain, and as wide as they are, where it is none."""

from __future__ import annotations

from fractions import Fraction
from pathlib import PurePath
from typing import Any

from rich.console import JustifyMethod
from rich.text import Text

from megatron_davinci.cli.data_order import MOST
from megatron_davinci.cli.screen import Screen, print_captured
from megatron_davinci.config.units import format_tokens

_DOCUMENTS = 12  # shown of a window
Answer = dict[str, Any]


def show(answer: Answer, *, one: bool) -> None:
    """Print an answer.

    Args:
        answer: Of `Teller`.
        one: Show everything about the one sample that it has.
    """
    screen = Screen()
    with screen.console.capture() as captured:
        if "sought" in answer:
            _finding(screen, answer)
        elif one:
            _sample(screen, answer["run"], answer["samples"][0])
        else:
            _samples(screen, answer)
        if answer["notes"]:
            screen.console.print()
        for note in answer["notes"]:
            screen.console.print(Text(f"note: {screen.safe(note)}", style="yellow"))
    print_captured(captured.get())


def _sample(screen: Screen, run: Answer, sample: Answer) -> None:
    n, source, window, record = sample["n"], sample["source"], sample["window"], sample["record"]
    batch, rank = sample["batch"], sample["rank"]
    screen.console.print(
        Text.assemble(
            (f"sample {n:,}", "bold cyan"),
            f" is window {window['number']:,} of ",
            (screen.safe(source["name"]), "bold cyan"),
            f", read in step {sample['step']:,} of {run['steps']:,}",
            (f" ({_state(sample)})" if sample["done"] is not None else ""),
        )
    )
    rows = [
        ("clock", f"{n:,} of {run['samples']:,} samples before it, {sample['tokens_before']:,} tokens "
         f"({format_tokens(sample['tokens_before'])})"),
        ("step", f"{sample['step']:,} of {run['steps']:,}: row {batch['row']:,} of {batch['size']:,} in the batch "
         f"that begins at sample {batch['first_sample']:,}; learning rate {sample['learning_rate']:.3e}"),
        ("rank", f"data-parallel rank {rank['data_rank']:,}, micro-batch {rank['micro_batch']:,}, row {rank['row']:,}"
         f" ({_layout(run)})"),
        ("stage", sample["stage"]),
        ("", ""),
        ("record", _record(record, run)),
    ]  # fmt: skip
    if sample["left_out"] is not None:
        left = sample["left_out"]
        rows.append(("left out", f"by record {left['record']} of the journal: {left['reason']}"))
    share = f"{100 * source['share']:.6g}%"
    rows += [
        ("source", f"{source['name']}, {share} of the samples here: this is its sample {source['position']:,} "
         f"since the run's beginning"),
        ("epoch", f"{source['epoch']:,}, as {source['windows']:,} windows make one: position "
         f"{source['position'] % source['windows']:,} of {source['windows']:,} in its shuffled order"),
        ("", ""),
        *_window_rows(window, source["windows"]),
    ]  # fmt: skip
    transforms = sample["transforms"]
    if transforms["applied"]:
        rows += [("", ""), ("transforms", _transforms(transforms))]
    screen.facts(rows)
    _documents(screen, window)
    screen.text("text", window)
    screen.text("as the model sees it", transforms)


def _window_rows(window: Answer, windows: int) -> list[tuple[str, str]]:
    loss = f"all of {window['labels']:,} labels carry it; the source has no mask"
    if window["has_mask"]:
        loss = f"{window['labels_with_loss']:,} of {window['labels']:,} labels carry it, by the source's mask"
    return [
        ("window", f"{window['number']:,} of {windows:,}"),
        ("file", window["file"]),
        ("shard", f"{window['shard']:,} of {window['shards']:,}"),
        ("tokens", f"{_range(window['tokens'])} of the shard ({window['labels'] + 1:,}, {window['dtype']})"),
        ("bytes", f"{_range(window['bytes'])} of the file"),
        ("loss", loss),
    ]


def _transforms(transforms: Answer) -> str:
    said = "; ".join(transforms["applied"])
    if transforms["tokens_cut"]:
        said += f"; {transforms['tokens_cut']:,} tokens past the end are cut"
    return f"{said}; {transforms['labels_with_loss']:,} labels carry loss"


def _documents(screen: Screen, window: Answer) -> None:
    documents = window["documents"]
    screen.console.print()
    screen.table(
        f"{len(documents):,} document{'s' if len(documents) > 1 else ''}",
        [("document", "right"), ("from token", "right"), ("tokens", "right"), ("in the window", "right"),
         ("begins there with", "left")],
        [
            [
                f"{document['number']:,}",
                f"{document['first_token']:,}",
                f"{document['tokens']:,}",
                _range(document["in_window"]),
                document["begins"],
            ]
            for document in documents[:_DOCUMENTS]
        ],
    )  # fmt: skip
    if len(documents) > _DOCUMENTS:
        screen.console.print(Text(f"and {len(documents) - _DOCUMENTS:,} more, all with --json", style="dim"))
    if documents and "origin" in documents[0]:
        _origins(screen, documents[:_DOCUMENTS])


def _origins(screen: Screen, documents: list[Answer]) -> None:
    """Where documents are from, as the source's sidecar has it."""
    known = [
        (document["number"], origin)
        for document in documents
        if document["origin"]
        for origin in document.get("origins") or [document["origin"]]
    ]
    screen.console.print()
    if not known:
        said = (
            "The source does not know where its documents are from: `davinci data run` makes those that do."
        )
        screen.console.print(Text(said, style="dim"))
        return
    screen.table(
        "where they are from",
        [
            ("document", "right"),
            ("level", "right"),
            ("bytes", "left"),
            ("licence", "left"),
            ("raw file", "left"),
        ],
        [
            [f"{number:,}", str(origin["level"]), _place(origin), origin["licence"] or "–", origin["path"]]
            for number, origin in known
        ],
    )
    for number, origin in known:
        corpus = f" --corpus {origin['corpus']}" if origin["corpus"] else ""
        line = f"{number:,}: davinci data lineage {screen.safe(origin['id'])}{screen.safe(corpus)}"
        screen.console.print(Text(line, style="dim"), soft_wrap=True)


def _place(origin: Answer) -> str:
    if origin["bytes"] is None:
        return f"row {origin['row']:,}"
    return f"{origin['first']:,} to {origin['first'] + origin['bytes']:,}"


def _samples(screen: Screen, answer: Answer) -> None:
    run, samples = answer["run"], answer["samples"]
    steps = sorted({sample["step"] for sample in samples})
    title = f"samples {samples[0]['n']:,} to {samples[-1]['n']:,} of {run['samples']:,}, " + (
        f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
    )
    screen.table(
        title,
        [("n", "right"), ("step", "right"), ("stage", "left"), ("source", "left"), ("epoch", "right"),
         ("window", "right"), ("shard", "right"), ("begins with", "left")],
        [
            [
                f"{sample['n']:,}",
                f"{sample['step']:,}",
                sample["stage"],
                sample["source"]["name"],
                f"{sample['source']['epoch']:,}",
                f"{sample['window']['number']:,}",
                f"{sample['window']['shard']:,}",
                _first_words(sample["window"]) + (" (left out)" if sample["left_out"] else ""),
            ]
            for sample in samples
        ],
    )  # fmt: skip


def _finding(screen: Screen, answer: Answer) -> None:
    run, source = answer["run"], answer["source"]
    rows: list[tuple[str, str]] = []
    if answer["sought"] == "window":
        what, text = "window", answer["window"]
        heading = f"window {text['number']:,} of {source['name']}"
        rows += _window_rows(text, source["windows"])[1:]
    else:
        document, what = answer["document"], "document"
        tokens = document["tokens"][1] - document["tokens"][0]
        text = document["begins"]
        first, end = document["windows"]
        heading = f"document {document['number']:,} of shard {document['shard']:,} of {source['name']}"
        rows += [
            ("file", document["file"]),
            ("document", f"{document['number']:,} of {document['documents']:,} in the shard"),
            ("tokens", f"{_range(document['tokens'])} of the shard ({tokens:,})"),
            ("bytes", f"{_range(document['bytes'])} of the file"),
            ("windows", "none: an empty document, or one in the shard's last tokens, which no window has"
             if end == first else f"{_range(document['windows'])} of {source['windows']:,} ({end - first:,})"),
        ]  # fmt: skip
    gives = f"{source['samples']:,} samples to this run: {source['epochs']:.4g} epochs"
    rows.append(("source", f"{source['name']} gives {gives} of {source['windows']:,} windows"))
    screen.console.print(Text(screen.safe(heading), style="bold cyan"))
    screen.facts(rows)
    whole = what == "window" or text["whole"]
    screen.text("text" if whole else "how it begins", text, counted=whole)
    screen.console.print()
    seen, times = answer["seen"], answer["times"]
    if not seen:
        screen.console.print(Text("never seen in this run", style="bold"))
        return
    columns: list[tuple[str, JustifyMethod]] = [
        ("epoch", "right"), ("window", "right"), ("n", "right"), ("step", "right"), ("row", "right"),
        ("tokens before", "right"), ("stage", "left"),
    ]  # fmt: skip
    table = [
        [
            f"{one['epoch']:,}",
            f"{one['window']:,}",
            f"{one['n']:,}",
            f"{one['step']:,}",
            f"{one['batch']['row']:,}",
            format_tokens(one["tokens_before"]),
            one["stage"],
        ]
        for one in seen
    ]
    title = f"seen in {times:,} sample{'s' if times > 1 else ''}"
    if run["done_samples"] is not None:
        title += f"; the run has done {run['done_samples']:,} of {run['samples']:,}"
        columns.append(("", "left"))
        table = [[*row, _state(one)] for row, one in zip(table, seen, strict=True)]
    screen.table(title, columns, table)
    if times > len(seen):
        how = f"; --count {times} has all" if times <= MOST else ""
        screen.console.print(Text(f"and {times - len(seen):,} more{how}", style="dim"))


def _record(record: Answer, run: Answer) -> str:
    weights = {source: Fraction(weight) for source, weight in record["weights"].items()}
    mixture = ", ".join(
        f"{source} {float(100 * weight):.6g}%" for source, weight in weights.items() if weight
    )
    where = "planned by the configuration"
    if record["from"] == "journal":
        where = f"{record['number']}, line {record['number'] + 1} of {PurePath(run['directory'], 'journal.jsonl')}"
    return f"{where}: from sample {record['first_sample']:,} on, {mixture}"


def _layout(run: Answer) -> str:
    source = {
        "--ranks": "as --ranks says",
        "the last start": "as the run's last start",
        "the smallest": "the fewest that it needs",
    }
    return f"{run['layout']}, {source[run['layout_from']]}"


def _first_words(window: Answer) -> str:
    if window["text"] is not None:
        words: str = window["text"]["first"][:80]
        return words
    return " ".join(map(str, window["ids"]["first"][:12]))


def _range(pair: list[int]) -> str:
    """The end is excluded, as in every range of bytes that an error names."""
    return f"{pair[0]:,} to {pair[1]:,}"


def _state(sample: Answer) -> str:
    return "left out" if sample["left_out"] else {True: "done", False: "to come", None: ""}[sample["done"]]
