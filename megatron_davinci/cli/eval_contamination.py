"""`davinci eval --suite contamination`: were these texts in the training data, by the data and by the model?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_davinci.cli.eval_plan import given_in, given_texts
from megatron_davinci.cli.screen import Screen
from megatron_davinci.errors import ConfigError, DataError
from megatron_davinci.evaluate.results import finite, samples_folder
from megatron_davinci.files import write_atomically

if TYPE_CHECKING:
    from megatron_davinci.cli.convert_to_hf import Found
    from megatron_davinci.data.tokenizer import Tokenizer
    from megatron_davinci.evaluate.ranks import Leader

NAMES = ("min_k", "min_k_plus", "dc_pdd")
_REFERENCE = 2000  # windows whose tokens are counted for DC-PDD


def contamination(
    arguments: argparse.Namespace,
    found: Found,
    leader: Leader,
    tokenizer: Tokenizer,
    longest: int,
    out: Path | None,
) -> dict[str, Any]:
    """Score texts and look for them in the samples up to the checkpoint; print it, and keep every text's scores.

    Args:
        arguments: The command's.
        found: The checkpoint.
        leader: All ranks' engines.
        tokenizer: The model's.
        longest: `max_sequence_length`.
        out: Where the texts' scores are written; None for nowhere.

    Returns:
        The record.
    """
    from megatron_davinci.evaluate.contamination import Frequencies, auroc, scores_of, true_positives
    from megatron_davinci.evaluate.overlap import overlap

    texts = given_texts(arguments.texts, arguments.limit or 10**6)
    if not texts:
        raise ConfigError(
            "There are no texts to look for.",
            where="--suite contamination",
            do="give them: --texts suspects=FILE.jsonl --texts unseen=FILE.jsonl",
        )
    if arguments.samples is not None and found.config is None:
        raise ConfigError(
            "A checkpoint by itself does not say what it was trained on.",
            where=f"--samples {arguments.samples}",
            found=found.checkpoint.folder,
            expected="RUN or RUN@STEP",
            do="name its run, or leave --samples out: the texts are then scored and not looked for",
        )
    names = [(name, number) for name, of in texts.items() for number in range(len(of))]
    encoded = tokenizer.encode_batch([text for of in texts.values() for text in of])
    for (name, number), tokens in zip(names, encoded, strict=True):
        if not len(tokens):
            raise DataError(
                "A text cannot be scored.",
                where=f"--texts {name}, record {number + 1}",
                found="no tokens",
                expected="one at least",
                do="leave it out",
            )
    # The end of a document before each, as in training.
    ids = [[tokenizer.eod_id, *one.tolist()][: longest + 1] for one in encoded]
    reference, seen = None, None
    if found.config is not None and found.config.data.sources:
        reference = Frequencies.of(_windows(found), max(tokenizer.vocab_size, found.config.model.vocab_size))
        seen = overlap([one[1:] for one in ids], _samples(found, arguments.samples))
    moments = leader.token_scores(ids)
    rows: list[dict[str, Any]] = []
    for place, (name, number) in enumerate(names):
        row = {"texts": name, "number": number, **scores_of(ids[place], moments[place], reference).record()}
        if seen is not None:
            row |= {"overlap": seen[place].share, "times": seen[place].times, "samples": seen[place].samples}
        rows.append(row)
    by_name = {name: [row for row in rows if row["texts"] == name] for name in texts}
    record: dict[str, Any] = {
        "texts": {
            name: {"number": len(of), **{key: _mean(of, key) for key in (*NAMES, "loss", "overlap")}}
            for name, of in by_name.items()
        }
    }
    if len(by_name) == 2:
        one, other = by_name.values()
        pairs = {key: ([row[key] for row in one], [row[key] for row in other]) for key in NAMES}
        pairs = {key: pair for key, pair in pairs.items() if np.isfinite(pair[0]).all()}
        record["auroc"] = {key: auroc(*pair) for key, pair in pairs.items()}
        record["true_positives_at_5_percent"] = {key: true_positives(*pair) for key, pair in pairs.items()}
    if out is not None:
        lines = "".join(json.dumps(finite(row)) + "\n" for row in rows)
        checkpoint = found.checkpoint.folder.name
        folder = samples_folder(checkpoint, None, arguments.limit, given_in(arguments))
        write_atomically(out / "samples" / folder / "contamination.jsonl", lines)
        record["samples_in"] = folder
    show(record)
    if out is not None:
        print(f"kept in {out / 'samples' / record['samples_in']}")
    if seen is None:
        print("overlap: a checkpoint by itself does not say what it was trained on; name its run")
    return record


def show(record: dict[str, Any]) -> None:
    """Print means by set of texts, and how well the scores tell the first set from the second."""
    keys = (*NAMES, "loss", "overlap")
    rows = [
        [name, f"{facts['number']:,}", *("" if facts[key] is None else f"{facts[key]:.4f}" for key in keys)]
        for name, facts in record["texts"].items()
    ]
    if "auroc" in record:
        first, second = record["texts"]
        rows.append(
            [
                f"AUROC {first} / {second}",
                "",
                *(f"{record['auroc'].get(k, np.nan):.3f}" for k in NAMES),
                "",
                "",
            ]
        )
    columns: list[tuple[str, Any]] = [
        ("texts", "left"),
        ("number", "right"),
        *((key, "right") for key in keys),
    ]
    Screen().table("", columns, rows)


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None and np.isfinite(row[key])]
    return float(np.mean(values)) if values else None


def _forecast(found: Found) -> Any:
    from megatron_davinci.train.forecast import Forecast

    assert found.config is not None
    return Forecast.read(found.config)


def _samples(found: Found, span: str | None) -> Iterator[tuple[int, np.ndarray]]:
    """Samples that the checkpoint was trained on, or those of a span `FIRST:END` of them."""
    first, end = 0, found.checkpoint.consumed_samples
    if span is not None:
        parts = span.split(":")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise ConfigError("Samples are given as FIRST:END.", where="--samples", found=span)
        first, end = int(parts[0]), min(end, int(parts[1]))
        if first >= end:
            raise ConfigError(
                "The checkpoint was trained on no such samples.",
                where="--samples",
                found=span,
                expected=f"FIRST below END, of 0:{found.checkpoint.consumed_samples}",
            )
    forecast = _forecast(found)
    for n in range(first, end):
        if forecast.skipped(n) is None:
            located = forecast.curriculum.locate(n)
            yield n, forecast.sources[located.source].read(located.window)


def _windows(found: Found) -> Iterator[np.ndarray]:
    """Windows that are spread over the sources, for how often tokens are there."""
    forecast = _forecast(found)
    share = max(1, _REFERENCE // len(forecast.sources))
    for source in forecast.sources.values():
        for window in range(0, source.num_windows, max(1, source.num_windows // share)):
            yield source.read(window)
