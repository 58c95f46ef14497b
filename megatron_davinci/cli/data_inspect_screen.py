"""The answers of `davinci data inspect` on a screen: coloured on a terminal, marked with brackets in a file."""

from __future__ import annotations

from typing import Any

from rich.cells import cell_len
from rich.console import JustifyMethod
from rich.padding import Padding
from rich.text import Text

from megatron_davinci.cli.data_inspect_run import MANY
from megatron_davinci.cli.data_inspect_sample import bracketed, coloured, from_values, legend
from megatron_davinci.cli.screen import Screen, can_print, print_captured
from megatron_davinci.config.units import format_tokens

Answer = dict[str, Any]
_EIGHTHS = " ▏▎▍▌▋▊▉"
_LONGEST_BAR = 40  # columns


def show(answer: Answer) -> None:
    """Print an answer.

    Args:
        answer: Of `inspect_source` or `inspect_run`.
    """
    screen = Screen()
    with screen.console.capture() as captured:
        if answer["kind"] == "source":
            _source(screen, answer["sources"][0])
        else:
            _run(screen, answer)
        if answer["samples"]:
            _samples(screen, answer)
        if answer["notes"]:
            screen.console.print()
        for note in answer["notes"]:
            screen.console.print(Text(f"note: {screen.safe(note)}", style="yellow"))
    print_captured(captured.get())


# ---- a source --------------------------------------------------------------------------------------------


def _source(screen: Screen, source: Answer) -> None:
    windows, read = source["windows"], source["read"]
    screen.console.print(
        Text.assemble((screen.safe(source["name"]), "bold cyan"), f", domain {screen.safe(source['domain'])}")
    )
    digest, eod = source["tokenizer_sha256"], source["eod_id"]
    vocabulary = "not known: there is no manifest"
    if source["has_manifest"]:
        vocabulary = f"{source['vocab_size']:,} ids, by tokenizer " + (digest[:16] if digest else "unknown")
    screen.facts(
        [
            ("place", source["place"]),
            ("tokens", f"{source['tokens']:,} ({format_tokens(source['tokens'])}) of {source['dtype']}, "
             f"{source['bytes']:,} bytes in {_many(source['shards'], 'shard')}"),
            ("documents", f"{source['documents']:,}"),
            ("vocabulary", vocabulary),
            ("EOD", "not known" if eod is None else f"token {eod:,}"),
            ("windows", f"{windows['number']:,} of {windows['sequence_length']:,} + 1 tokens; "
             f"{windows['lost_tokens']:,} tokens at ends of shards are in none"),
            ("", ""),
            ("read", _read(source)),
            ("loss", _loss(source)),
            ("lengths", lengths(source)),
        ]
    )  # fmt: skip
    if read["histogram"]:
        screen.console.print()
        _histogram(screen, read)


def _read(source: Answer) -> str:
    read = source["read"]
    if not read["is_sample"]:
        wrong = source["shards"] - read["shards"]
        what = "the indexes and masks" if source["has_mask"] else "the indexes"
        return f"{what} of all shards" + (f" but {wrong:,} that are damaged" if wrong else "")
    return (
        f"a sample: {read['shards']:,} of {_many(source['shards'], 'shard')}, {read['documents']:,} documents; "
        "what follows is of these"
    )


def _loss(source: Answer) -> str:
    read = source["read"]
    if not source["has_mask"]:
        return "all tokens carry it; there is no mask"
    return (
        f"{share(source)} of the tokens carry it, by the mask: {read['loss_tokens']:,} of {read['tokens']:,}"
    )


def share(source: Answer) -> str:
    """The share of tokens that carry loss."""
    read = source["read"]
    return f"{100 * read['loss_tokens'] / read['tokens']:.4g}%" if read["tokens"] else "–"


def lengths(source: Answer) -> str:
    """Quantiles of the documents' lengths, in a line."""
    read = source["read"]
    values = [f"p{percent} {value:,}" for percent, value in read["percentiles"].items()]
    return (
        f"{', '.join(values)}, max {read['longest']:,} tokens a document; {read['empty_documents']:,} empty"
    )


def _histogram(screen: Screen, read: Answer) -> None:
    bins, documents = read["histogram"], max(1, read["documents"])
    tokens, most = max(1, read["tokens"]), max(one["documents"] for one in read["histogram"])
    rows = [
        [
            bin_name(one),
            f"{one['documents']:,}",
            f"{100 * one['documents'] / documents:.1f}%",
            f"{100 * one['tokens'] / tokens:.1f}%",
        ]
        for one in bins
    ]
    heads = ["tokens", "documents", "of documents", "of tokens"]
    taken = sum(max(len(head), *(len(row[i]) for row in rows)) + 2 for i, head in enumerate(heads))
    room = min(_LONGEST_BAR, max(8, screen.console.width - taken - 2))
    fine = can_print("█" + _EIGHTHS)
    for row, one in zip(rows, bins, strict=True):
        row.append(bar(one["documents"] / most, room, fine))
    columns: list[tuple[str, JustifyMethod]] = [(head, "right") for head in heads]
    screen.table("documents by length", [*columns, ("", "left")], rows)


def bin_name(one: Answer) -> str:
    """The lengths of a bin."""
    return f"{one['first']:,}" if one["first"] == one["last"] else f"{one['first']:,} to {one['last']:,}"


def bar(fraction: float, room: int, fine: bool = True) -> str:
    """A bar of block characters: `room` columns for 1; something for what is little, nothing for 0."""
    eighths = max(int(fraction > 0), round(8 * room * fraction))
    if not fine:
        return "#" * -(-eighths // 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


# ---- a run -----------------------------------------------------------------------------------------------


def _run(screen: Screen, answer: Answer) -> None:
    run = answer["run"]
    screen.console.print(
        Text.assemble(
            (screen.safe(run["directory"]), "bold cyan"),
            f": {run['steps']:,} steps, {run['samples']:,} samples of {run['sequence_length']:,} tokens, "
            f"{format_tokens(run['tokens'])} tokens",
        )
    )
    sampled = [one for one in answer["sources"] if one["counted"] and one["read"]["is_sample"]]
    screen.console.print()
    _holdings(screen, f"sources ({len(answer['sources'])})", answer["sources"])
    if sampled:
        most = max(one["read"]["shards"] for one in sampled)
        text = f"a sample: lengths and loss are of at most {_many(most, 'shard')} of each source"
        screen.console.print(Text(text, style="dim"))
    screen.console.print()
    _epochs(screen, answer)
    screen.console.print()
    screen.table(
        "stages",
        [("stage", "left"), ("steps", "right"), ("samples", "right"), ("tokens", "right"), ("", "left")],
        [
            [one["name"], *(f"{one[key]:,}" for key in ("steps", "samples", "tokens")), format_tokens(one["tokens"])]
            for one in answer["stages"]
        ],
    )  # fmt: skip
    screen.console.print()
    if answer["validation"]:
        _holdings(screen, "held out", answer["validation"])
    else:
        screen.console.print("held out: nothing; data.validation is empty")


def _holdings(screen: Screen, title: str, sources: list[Answer]) -> None:
    rows, last = [], None
    for one in sources:
        domain, last = "" if one["domain"] == last else one["domain"], one["domain"]
        if not one["counted"]:
            rows.append([domain, one["name"], *["–"] * 6, "damaged"])
            continue
        read = one["read"]
        rows.append(
            [
                domain,
                one["name"],
                format_tokens(one["tokens"]),
                f"{one['documents']:,}",
                *(f"{read['percentiles'][percent]:,}" for percent in ("50", "99")),
                f"{read['longest']:,}",
                f"{one['windows']['number']:,}",
                "damaged" if one["problems"] else share(one) if one["has_mask"] else "all",
            ]
        )
    names = ("domain", "source", "tokens", "documents", "p50", "p99", "longest", "windows", "loss")
    columns: list[tuple[str, JustifyMethod]] = [
        (name, "left" if name in ("domain", "source", "loss") else "right") for name in names
    ]
    screen.table(title, columns, rows)


def _epochs(screen: Screen, answer: Answer) -> None:
    """Epochs by stage and in total; several tables where the stages do not fit one."""
    sources, stages = answer["sources"], [stage["name"] for stage in answer["stages"]]
    flags = [flag(one["use"]) for one in sources]
    cells = [[epochs(one["use"], stage) for one in sources] for stage in range(len(stages))]
    widths = [
        min(32, max(cell_len(screen.safe(name)), *map(len, column))) + 2
        for name, column in zip(stages, cells, strict=True)
    ]
    names = max(cell_len(screen.safe(one["name"])) for one in sources)
    room = screen.console.width - min(24, names) - 2 - 28
    first, title = 0, "epochs that the run takes"
    while first < len(stages):
        end = first + 1
        while end < len(stages) and sum(widths[first : end + 1]) <= room:
            end += 1
        columns: list[tuple[str, JustifyMethod]] = [("source", "left")]
        columns += [(name, "right") for name in stages[first:end]]
        rows = [[one["name"], *(column[i] for column in cells[first:end])] for i, one in enumerate(sources)]
        if end == len(stages):
            columns += [("total", "right"), ("", "left")]
            rows = [
                [*row, epochs(one["use"]), text] for row, one, text in zip(rows, sources, flags, strict=True)
            ]
        else:
            columns.append(("", "left"))
            rows = [[*row, ""] for row in rows]
        screen.table(title, columns, rows)
        first, title = end, "and in the stages after them"


def epochs(use: Answer, stage: int | None = None) -> str:
    """How often a source is passed through, in a stage or in all."""
    if use["epochs"] is None:
        return "?"
    count = use["total_epochs"] if stage is None else use["epochs"][stage]
    if count == 0:
        return "–"
    return f"{count:,.2f}" if count >= 0.1 else f"{count:.1g}" if count < 0.001 else f"{count:.4f}"


def flag(use: Answer) -> str:
    """What is remarkable in how a source is used."""
    if not use["total_samples"]:
        return "never used"
    over = use["total_epochs"] is not None and use["total_epochs"] > MANY
    return f"over {MANY} epochs" if over else ""


# ---- samples ---------------------------------------------------------------------------------------------


def heading(sample: Answer) -> str:
    """What a sample is, in a line."""
    if sample["n"] is None:
        what = f"window {sample['window']:,} of {sample['source']}"
    else:
        what = f"sample {sample['n']:,}, stage {sample['stage']}, epoch {sample['epoch']:,} of {sample['source']}"
        if sample["spans"] is not None:
            what += f", window {sample['window']:,}"
    if sample["spans"] is None:
        return f"{what}: cannot be read"
    return (
        f"{what}: {_many(sample['documents'], 'document')}, "
        f"{sample['labels_with_loss']:,} of {sample['labels']:,} labels carry loss"
        + "".join(f"; {one}" for one in sample["applied"])
    )


def _samples(screen: Screen, answer: Answer) -> None:
    colours = screen.console.is_terminal and not screen.console.no_color and can_print("⏎│…")
    screen.console.print()
    screen.console.print(legend(colours))
    for sample in answer["samples"]:
        screen.console.print()
        screen.console.print(Text(screen.safe(heading(sample)), style="bold"))
        if sample["spans"] is None:
            continue
        parts = from_values(sample["spans"])
        body = coloured(parts) if colours else Text(bracketed(parts).expandtabs(4))
        screen.console.print(Padding(body, (0, 0, 0, 2), expand=False))


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
