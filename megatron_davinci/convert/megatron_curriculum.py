"""How long a command trains, in which batches, at which learning rate and on which data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any

from megatron_davinci.convert import megatron_schedule as schedule
from megatron_davinci.convert.megatron_ledger import Ledger

_STYLES = ("constant", "linear", "cosine", "WSD")
_PATH_TO_FILL_IN = "path/to/your/source"
_WEIGHT = re.compile(r"[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]{1,2})?|[0-9]+\.")


def curriculum(ledger: Ledger, default_batch: int | None) -> list[dict[str, Any]]:
    """The stages, without mixtures.

    Args:
        ledger: The command's flags.
        default_batch: Sequences a step where the command gives no global batch size.
    """
    length = ledger.integer("--seq-length", None, 1)
    if length is None:
        if not ledger.has("--seq-length"):
            ledger.problem("--seq-length", expected="that the command gives it")
        length = 1
    sizes = _sizes(ledger, default_batch, length)
    last = sizes[-1][1]
    steps, samples = ledger.integer("--train-iters"), ledger.integer("--train-samples")
    if (steps is None) == (samples is None):
        flags = [name for name in ("--train-iters", "--train-samples") if ledger.has(name)]
        ledger.problem(*(flags or ["--train-iters", "--train-samples"]), expected="exactly one of the two")
        samples = None
    _units_agree(ledger, by_steps=steps is not None)
    runs = schedule.runs_for(sizes, samples=samples, steps=steps or (None if samples else 1))
    if not runs:
        ledger.problem("--train-iters", "--train-samples", expected="at least one step of training")
        runs = [(last, 1)]
    ledger.carry("--train-iters", "curriculum.*.tokens")
    ledger.carry("--train-samples", "curriculum.*.tokens")
    decay = _decay(ledger, schedule.total(runs), last)
    stages, changed = schedule.stages(runs, decay, length)
    if len(schedule.split(runs, decay.warmup)[0]) > 1:
        flag = next(
            name for name in ("--rampup-batch-size", "--step-batch-size-schedule") if ledger.has(name)
        )
        why = "the warm-up rises by steps; Megatron-LM's by samples, which differs while the batch grows"
        ledger.lost_note(flag, why, "none: both arrive at the peak after the same samples")
    for flag, why in changed:
        for name in (f"{flag}-iters", f"{flag}-samples"):
            ledger.lose(name, why, "choose curriculum.*.learning_rate.end")
    for name in ("--lr-decay-iters", "--lr-decay-samples"):
        ledger.carry(name, "curriculum.*.tokens: where a stage ends")
    return stages


def _units_agree(ledger: Ledger, *, by_steps: bool) -> None:
    length = "--train-iters" if by_steps else "--train-samples"
    if not ledger.has(length):
        return
    other = "samples" if by_steps else "iters"
    for name in ("--lr-decay-", "--lr-warmup-", "--lr-wsd-decay-"):
        if ledger.text(f"{name}{other}", "0") != "0":
            unit = "iters" if by_steps else "samples"
            ledger.problem(length, f"{name}{other}", expected=f"{name}{unit}, in the unit of {length}")


def _sizes(ledger: Ledger, default_batch: int | None, length: int) -> list[tuple[int, int]]:
    """The batch sizes, each with the samples after which it holds."""
    ramp, steps = ledger.given.get("--rampup-batch-size"), ledger.given.get("--step-batch-size-schedule")
    said = ledger.integer("--global-batch-size", None, 1)
    for name in ("--global-batch-size", "--step-batch-size-schedule", "--rampup-batch-size"):
        ledger.carry(name, "curriculum.*.global_batch_size")
    if steps is not None:
        try:
            sizes = schedule.step_schedule(" ".join(steps.values), length)
        except ValueError as error:
            ledger.problem("--step-batch-size-schedule", expected=f'"0:16 2.4B:320"; {error}')
            return [(0, 1)]
        # Megatron-LM's own example gives both; there is no doubt what it means while they agree.
        if ramp or (said is not None and said != sizes[-1][1]):
            names = ("--step-batch-size-schedule", "--global-batch-size", "--rampup-batch-size")
            ledger.problem(*names, expected="the schedule alone")
        return sizes
    size = said or default_batch
    if size is None:
        ledger.problem(
            "--global-batch-size", expected="its number; without it, it would follow from the ranks"
        )
        return [(0, 1)]
    if ramp is None:
        return [(0, size)]
    if ledger.has("--train-iters"):
        ledger.problem("--train-iters", "--rampup-batch-size", expected="--train-samples with a batch ramp")
    try:
        start, increment, samples = (int(value[:18]) for value in ramp.values)
        return schedule.ramp(start, increment, samples, size)
    except ValueError as error:
        ledger.problem("--rampup-batch-size", expected=f"START INCREMENT SAMPLES; {error}")
        return [(0, size)]


def _decay(ledger: Ledger, whole: int, batch: int) -> schedule.Decay:
    """The learning-rate schedule; `batch` is what Megatron-LM multiplies iterations with."""
    style = ledger.text("--lr-decay-style", "linear") or "linear"
    if style in _STYLES:
        ledger.carry("--lr-decay-style", "curriculum.*.learning_rate.shape")
    else:
        shapes = "constant, linear and cosine"
        ledger.lose("--lr-decay-style", f"a stage has {shapes}; linear is written", "choose a shape")
        style = "linear"
    peak, end = ledger.number("--lr"), ledger.number("--min-lr", 0.0) or 0.0
    if peak is None:
        if not ledger.has("--lr"):
            ledger.problem("--lr", expected="that the command gives it")
        peak = end
    if end > peak:
        ledger.problem("--lr", "--min-lr", expected="--min-lr at most --lr")
    ledger.carry("--lr", "curriculum.*.learning_rate.peak")
    if style == "constant":
        ledger.ignore("--min-lr", "the learning rate is constant")
    ledger.carry("--min-lr", "curriculum.*.learning_rate.end")

    def samples(name: str, default: int) -> int:
        steps = ledger.integer(f"{name}-iters")
        return steps * batch if steps is not None else ledger.integer(f"{name}-samples", default) or 0

    decay_end = samples("--lr-decay", whole)
    warmup = samples("--lr-warmup", 0)
    fraction = ledger.number("--lr-warmup-fraction")
    if fraction is not None:
        if warmup:
            ledger.problem("--lr-warmup-fraction", "--lr-warmup-iters", "--lr-warmup-samples", expected="one")
        warmup = int(fraction * decay_end)
    if decay_end <= warmup and (ledger.has("--lr") or warmup):
        names = ("--lr-decay-iters", "--lr-decay-samples", "--lr-warmup-iters", "--lr-warmup-samples",
                 "--lr-warmup-fraction")  # fmt: skip
        ledger.problem(*names, expected="a warm-up that is shorter than the decay")
    for name in ("iters", "samples", "fraction"):
        ledger.carry(f"--lr-warmup-{name}", "curriculum.0.learning_rate.warmup_steps")
    begins = ledger.number("--lr-warmup-init", 0.0) or 0.0
    ledger.carry("--lr-warmup-init", "curriculum.0.learning_rate.warmup_from")
    wsd_style, wsd_begin = _wsd(ledger, style, samples("--lr-wsd-decay", 0), warmup, decay_end)
    return schedule.Decay(style, peak, end, warmup, begins, decay_end, wsd_style, wsd_begin)


def _wsd(ledger: Ledger, style: str, length: int, warmup: int, decay_end: int) -> tuple[str, int]:
    """WSD's shape, and where its decay begins."""
    names = ("--lr-wsd-decay-style", "--lr-wsd-decay-iters", "--lr-wsd-decay-samples")
    if style != "WSD":
        for name in names:
            ledger.ignore(name, "--lr-decay-style is not WSD")
        return "linear", 0
    if not 0 < length <= decay_end - warmup:
        ledger.problem("--lr-decay-style", *names[1:], expected="a decay that begins after the warm-up")
    shape = ledger.text("--lr-wsd-decay-style", "exponential") or ""
    if shape in ("linear", "cosine"):
        ledger.carry(names[0], "curriculum.*.learning_rate.shape")
    else:
        why, do = f"a stage has no {shape} decay; linear is written", "choose a shape for the stage"
        ledger.lose(names[0], why, do)
        if not ledger.has(names[0]):
            ledger.lose_default(f"{names[0]} {shape}", why, do)
        shape = "linear"
    for name in names[1:]:
        ledger.carry(name, "curriculum.*.tokens: where a stage ends")
    return shape, max(0, decay_end - length)


# ---- data ------------------------------------------------------------------------------------------------


def sources(ledger: Ledger) -> tuple[dict[str, Any], dict[str, str]]:
    """The `data` section, and the mixture of every stage."""
    flag = "--train-data-path" if ledger.has("--train-data-path") else "--data-path"
    prefixes, weights = _blend(ledger, flag)
    if not prefixes:
        if not ledger.has("--mock-data") and flag not in ledger.given:
            ledger.lose_default(
                "--data-path", "a run needs a source; its path is to be filled in", "write it"
            )
        prefixes, weights = [_PATH_TO_FILL_IN], [Fraction(1)]
    ledger.carry(flag, "data.sources, curriculum.*.mixture")
    ledger.ignore("--data-path", "--train-data-path says more")
    names = _names(prefixes)
    data: dict[str, Any] = {}
    tokenizer = ledger.text("--tokenizer-model")
    if tokenizer and ledger.text("--tokenizer-type") == "HuggingFaceTokenizer":
        data["tokenizer"] = tokenizer
        ledger.carry("--tokenizer-model", "data.tokenizer: a folder with tokenizer.json")
    ledger.lose(
        "--tokenizer-model",
        "a tokenizer is a folder with tokenizer.json",
        "make one of it; set data.tokenizer",
    )
    data["sequence_length"] = ledger.integer("--seq-length", 1, 1)
    ledger.carry("--seq-length", "data.sequence_length")
    data["sources"] = {name: {"path": prefix} for name, prefix in zip(names, prefixes, strict=True)}
    held_out, shares = _blend(ledger, "--valid-data-path", say=False)
    if held_out:
        data["validation"] = dict(zip(_names(held_out), held_out, strict=True))
        ledger.carry("--valid-data-path", "data.validation" + (", each by itself" if len(shares) > 1 else ""))
    _split(ledger)
    return data, {name: _decimal(weight) for name, weight in zip(names, weights, strict=True)}


def _blend(ledger: Ledger, flag: str, *, say: bool = True) -> tuple[list[str], list[Fraction]]:
    """Prefixes and their shares, which sum to 1; a prefix that is given twice has both."""
    words = list(ledger.given[flag].values) if ledger.has(flag) else []
    # As Megatron-LM reads it: pairs if all that stands first is a number, else prefixes only.
    paired = len(words) > 1 and len(words) % 2 == 0 and all(_WEIGHT.fullmatch(word) for word in words[::2])
    prefixes = words[1::2] if paired else words
    weights = [Fraction(word) for word in words[::2]] if paired else [Fraction(1)] * len(words)
    if paired and sum(weights) <= 0:
        ledger.problem(flag, expected="a weight above 0")
        weights = [Fraction(1)] * len(prefixes)
    if say and not paired and len(set(words)) > 1:
        why = "Megatron-LM weighs them by their sizes; equal shares are written"
        ledger.lost_note(
            flag, why, "write the shares in curriculum.*.mixture; `davinci data inspect` says the sizes"
        )
    shares: dict[str, Fraction] = {}
    for prefix, weight in zip(prefixes, weights, strict=True):
        shares[prefix] = shares.get(prefix, Fraction(0)) + weight / sum(weights)
    return list(shares), list(shares.values())


def _names(prefixes: Sequence[str]) -> list[str]:
    """A name for each source: the last part of its path, numbered where two are alike."""
    names: list[str] = []
    for prefix in prefixes:
        last = (
            PurePosixPath(prefix)
            .name.removesuffix("_document")
            .removesuffix("_text")
            .removesuffix("_content")
        )
        base = re.sub(r"[^A-Za-z0-9_-]+", "-", last).strip("-") or "data"
        name, number = base, 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names


def _decimal(share: Fraction) -> str:
    """A share as decimal text if that is exact and short, else as a fraction."""
    decimal = Decimal(share.numerator) / Decimal(share.denominator)
    return (
        format(decimal.normalize(), "f")
        if Fraction(decimal) == share and len(str(decimal)) < 16
        else str(share)
    )


def _split(ledger: Ledger) -> None:
    text = ledger.text("--split")
    why = "training reads all of a source, and what is held out is a source of its own"
    do = "tokenise the held-out documents apart and name them in data.validation"
    if text is None:
        if not ledger.has("--valid-data-path") and not ledger.has("--mock-data"):
            ledger.lose_default("--split", why, do)
        return
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]*\.?[0-9]+|[0-9]+\.", part) for part in parts):
        ledger.problem("--split", expected="numbers, as in 949,50,1")
    elif all(float(part) == 0 for part in parts[1:]):
        ledger.ignore("--split", "all is for training")
    ledger.lose("--split", why, do)
