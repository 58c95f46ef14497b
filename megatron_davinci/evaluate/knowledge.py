"""What a checkpoint knows of made-up texts: bits a parameter of biographies, and facts by three kinds of probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log, sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_davinci.data.knowledge.biographies import (
    ATTRIBUTE_BITS,
    ATTRIBUTES,
    NAME_BITS,
    biography,
)
from megatron_davinci.data.knowledge.corpus import Knowledge
from megatron_davinci.data.knowledge.facts import CONDITIONS, KINDS, probes
from megatron_davinci.evaluate.tasks import TaskResult

# Answers to (text before, what follows): log-probability in nats, and whether it is what greedy decoding gives.
Ask = Callable[[Sequence[tuple[str, str]]], list[tuple[float, bool]]]
Row = dict[str, Any]


def capacity(
    name_losses: ArrayLike, attribute_losses: ArrayLike, people: int, parameters: int
) -> dict[str, tuple[float, float]]:
    """Bits that a model has learnt of biographies (Allen-Zhu and Li, arXiv 2404.05405, theorem 3.2).

    `R = (N log2(N0 / e^p1) + N log2(S0 / e^p2)) / P`, where `p1` and `p2` are the mean losses of names and of all
    attributes together, and `N0` and `S0` how many there are. A part below 0, of a model that is surer of something
    else than chance would have it, counts as 0.

    Args:
        name_losses: [asked] nats of each name.
        attribute_losses: [asked, attributes] nats of each value.
        people: N, all that were trained on.
        parameters: P.

    Returns:
        (value, standard error over persons) of `bits_per_parameter`, `bits_per_person`, `name_loss` and
        `attribute_loss`; the errors NaN for one person.
    """
    names, values = np.asarray(name_losses, np.float64), np.asarray(attribute_losses, np.float64).sum(1)
    parts = [(NAME_BITS, names / log(2)), (ATTRIBUTE_BITS, values / log(2))]
    bits = sum(max(0.0, most - float(losses.mean())) for most, losses in parts)
    # A part that counts as 0 has no noise.
    noise = sum(
        (losses if most > losses.mean() else np.zeros_like(losses) for most, losses in parts),
        np.zeros_like(names),
    )
    error = _error(noise)
    return {
        "bits_per_parameter": (people * bits / parameters, people * error / parameters),
        "bits_per_person": (bits, error),
        "name_loss": (float(names.mean()), _error(names)),
        "attribute_loss": (float(values.mean()), _error(values)),
    }


def probe(knowledge: Knowledge, ask: Ask, parameters: int, limit: int | None = None) -> list[TaskResult]:
    """Ask everything.

    Args:
        knowledge: What the texts were made of.
        ask: Asks the model; no text before stands for the beginning of a document.
        parameters: Of the model.
        limit: Persons, and facts of each condition, at most.

    Returns:
        `biographies`, and `facts_CONDITION` by each kind of probe. Where a logit is no number there are no metrics.
    """
    results = []
    if knowledge.people:
        results.append(_biographies(knowledge, ask, parameters, limit))
    if knowledge.facts:
        results += _facts(knowledge, ask, limit)
    return results


def _biographies(knowledge: Knowledge, ask: Ask, parameters: int, limit: int | None) -> TaskResult:
    persons = knowledge.persons()[:limit]
    generator = np.random.default_rng([knowledge.seed, 4])
    asked: list[tuple[str, str]] = []
    for person in persons:
        text, begins = biography(person, generator)
        asked.append(("", person.name))
        asked += [(text[: begins[name]].rstrip(), f" {person.values[name]}") for name in ATTRIBUTES]
    answers = ask(asked)
    logs = np.array([one for one, _ in answers]).reshape(len(persons), -1)
    greedy = np.array([right for _, right in answers]).reshape(len(persons), -1)
    result = TaskResult("biographies", protocol="capacity", shots=0, items=len(persons))
    if trouble := _not_numbers(logs):
        return _with(result, problem=trouble)
    found = capacity(-logs[:, 0], -logs[:, 1:], knowledge.people, parameters)
    for place, name in enumerate(ATTRIBUTES, 1):
        found[f"{name}_known"] = float(greedy[:, place].mean()), _error(greedy[:, place].astype(np.float64))
    rows = [
        {"doc": number, "target": person.name, "name_loss": -line[0]}
        | dict(zip((f"{name}_loss" for name in ATTRIBUTES), (-line[1:]).tolist(), strict=True))
        for number, (person, line) in enumerate(zip(persons, logs, strict=True))
    ]
    return _with(result, found, rows)


def _facts(knowledge: Knowledge, ask: Ask, limit: int | None) -> list[TaskResult]:
    made = knowledge.made_up()
    made = made[: None if limit is None else limit * len(CONDITIONS)]
    asked = probes(made)
    answers = ask([(one.before, one.answer) for one in asked])
    results = []
    for kind in KINDS:
        for condition in CONDITIONS:
            chosen = [
                (one, answer)
                for one, answer in zip(asked, answers, strict=True)
                if (one.kind, one.condition) == (kind, condition)
            ]
            logs = np.array([log for _, (log, _) in chosen])
            right = np.array([greedy for _, (_, greedy) in chosen], np.float64)
            result = TaskResult(f"facts_{condition}_{kind}", protocol=kind, shots=0, items=len(chosen))
            if trouble := _not_numbers(logs):
                results.append(_with(result, problem=trouble))
                continue
            rows = [
                {"doc": number, "target": one.answer, "log_probability": value, "recalled": recalled}
                for number, ((one, _), value, recalled) in enumerate(
                    zip(chosen, logs.tolist(), right.tolist(), strict=True)
                )
            ]
            found = {
                "log_probability": (float(logs.mean()), _error(logs)),
                "recalled": (float(right.mean()), _error(right)),
            }
            results.append(_with(result, found, rows))
    return results


def _with(
    result: TaskResult,
    found: dict[str, tuple[float, float]] | None = None,
    rows: Sequence[Row] = (),
    problem: str | None = None,
) -> TaskResult:
    found = found or {}
    return replace(
        result,
        metrics={f"{name},none": value for name, (value, _) in found.items()},
        errors={f"{name},none": error for name, (_, error) in found.items()},
        samples={result.task: list(rows)} if rows else {},
        problem=problem,
    )


def _not_numbers(logs: np.ndarray) -> str | None:
    bad = int((~np.isfinite(logs)).sum())
    return f"{bad} of {logs.size} answers: logits that are not numbers" if bad else None


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) / sqrt(len(values)) if len(values) > 1 else float("nan")
