"""What a recipe's models will be asked, and what that costs, told from a sample of its sources before it starts.

The sample goes through the recipe's rules, is cut into chunks, and each question is written as it will be asked: so
calls and prompt tokens are measured. How long answers are nobody can know: those that lie on disk for the sample's
questions are measured too, the others are taken to be as long as their task makes likely (`Expected.share`).
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.data import Document

from megatron_davinci.darwin import acquire
from megatron_davinci.darwin.answers import Answers, question_key
from megatron_davinci.darwin.asking import Asking, measure_of
from megatron_davinci.darwin.inventory import InputFile, take_inventory
from megatron_davinci.darwin.pipeline import acquire_hash, first_document, looks_at, note
from megatron_davinci.darwin.provenance import fate_of
from megatron_davinci.darwin.recipe import LoadedRecipe, SourceRecipe
from megatron_davinci.darwin.step import GlobalStep, Step

CHARACTERS_A_TOKEN = 4.0  # of English, where there is no tokenizer to count with
IMAGE_TOKENS = 2000.0  # of a page as a picture: a supposition, models differ by several times


class Rates(NamedTuple):
    """What is known of a server beyond the recipe.

    Attributes:
        input_price: Of a million prompt tokens; None for the recipe's.
        output_price: Of a million answer tokens, likewise.
        tokens_a_second: Answer tokens that it writes, over all requests; None if nobody knows.
    """

    input_price: float | None = None
    output_price: float | None = None
    tokens_a_second: float | None = None


@dataclass
class StepCost:
    """What a step will ask, over all documents.

    Attributes:
        step: Its name.
        model: As the server calls it.
        documents: That it looks at.
        calls: Questions, one try each, that are not answered on disk.
        known: Questions whose answers are on disk.
        most_calls: Calls, where every answer but the last of a question breaks a gate.
        prompt_tokens: Of `calls`.
        answer_tokens: Likewise.
        price: Of both, in the currency of the prices.
        hours: At the recipe's limits and the server's pace; None where neither is known.
        measured: Share of the sample's questions whose answer was on disk, and so of known length.
    """

    step: str
    model: str
    documents: float = 0.0
    calls: float = 0.0
    known: float = 0.0
    most_calls: float = 0.0
    prompt_tokens: float = 0.0
    answer_tokens: float = 0.0
    price: float = 0.0
    hours: float | None = None
    measured: float = 0.0


@dataclass(frozen=True)
class CostPlan:
    """What a recipe will cost.

    Attributes:
        steps: Of the steps that ask a model.
        sampled: Documents of the sample, by source.
        documents: All that there are, by source, about.
        dropped: Of the sample, by the rules before and between.
        tokenizer: Whether tokens were counted by one, or taken to be four characters.
        passed_over: Steps over all documents, which are taken to drop nothing.
    """

    steps: list[StepCost]
    sampled: dict[str, int]
    documents: dict[str, float]
    dropped: dict[str, int]
    tokenizer: bool
    passed_over: list[str] = field(default_factory=list)


def estimate(
    loaded: LoadedRecipe, sample: int, tokenizer: Path | None = None, rates: Rates | None = None
) -> CostPlan:
    """Estimate a recipe.

    Args:
        loaded: The recipe.
        sample: Documents to look at of each source.
        tokenizer: Folder of the model's; None for the recipe's.
        rates: What is known besides.

    Raises:
        ConfigError: A source names no file, or a prompt cannot be used.
    """
    recipe, files, rates = loaded.recipe, take_inventory(loaded), rates or Rates()
    folder = tokenizer or loaded.tokenizer
    count = _counter(folder)
    weights, documents, total = dict[str, float](), list[Document](), dict[str, float]()
    for source in recipe.sources:
        own = [file for file in files if file.source == source.name]
        found, seen = _sampled(own, source, recipe.limits.document_bytes, sample)
        size = sum(file.size for file in own)
        weights[source.name] = size / seen if seen else 0.0
        total[source.name] = weights[source.name] * len(found)
        documents += found
    steps, passed_over = [], []
    for step in recipe.make_steps(loaded.base):
        if isinstance(step, GlobalStep):
            passed_over.append(step.name)
        elif isinstance(step, Asking):
            steps.append(_asked(step, documents, weights, count, rates))
            for document in documents:
                if looks_at(step, document):
                    step.suppose(document)
        else:
            _apply(step, documents)
    dropped = Counter(f"{fate['step']}/{fate['reason']}" for d in documents if (fate := fate_of(d)))
    sampled = Counter(document.metadata["source"] for document in documents)
    return CostPlan(steps, dict(sampled), total, dict(dropped), folder is not None, passed_over)


def _sampled(
    files: Sequence[InputFile], source: SourceRecipe, limit: int, wanted: int
) -> tuple[list[Document], float]:
    """The first documents of files that their names' hash chooses, and how many bytes of the files they are."""
    chosen = sorted(files, key=lambda file: hashlib.blake2b(file.name.encode(), digest_size=8).digest())
    found: list[Document] = []
    seen, hash_ = 0.0, acquire_hash(source, limit)
    each = -(-wanted // max(1, min(len(files), wanted)))
    for file in chosen:
        if len(found) >= wanted:
            break
        documents = acquire.read_file(file, source, limit)
        first = list(islice(documents, each))
        rest = next(documents, None)
        plain = not file.path.endswith((".gz", ".zst")) and all("bytes" in raw.origin for raw in first)
        if rest is None:
            seen += file.size
        elif plain and first:
            seen += sum(raw.origin["bytes"] for raw in first)
        else:  # how much of it that was is only known when its documents are counted
            seen += file.size * len(first) / (len(first) + 1 + sum(1 for _ in documents))
        found += [first_document(raw, source, hash_) for raw in first]
    return found, seen


def _apply(step: Step, documents: Sequence[Document]) -> None:
    step.check()
    step.open()
    try:
        for document in documents:
            if looks_at(step, document):
                note(step, document, step.apply(document))
    finally:
        step.close()


def _asked(
    step: Asking,
    documents: Sequence[Document],
    weights: dict[str, float],
    count: Callable[[str], float],
    rates: Rates,
) -> StepCost:
    endpoint = step.parameters.endpoint
    cost = StepCost(step.name, endpoint.model)
    path = step.parameters.answers
    answers = Answers(path, read_only=True) if path.is_file() else None
    lengths = defaultdict[str, list[float]](list)  # answer tokens for one of the passage, by kind of question
    shares = dict[str, float]()
    open_: list[tuple[float, str, float, float]] = []
    asked = 0
    try:
        for document in documents:
            if not looks_at(step, document):
                continue
            weight = weights[document.metadata["source"]]
            cost.documents += weight
            for question in step.expected(document):
                asked_for = {"messages": question.messages, "attempt": 0, **endpoint.fields_of(question.form)}
                key = question_key({**endpoint.decides, **asked_for})
                answer = answers.get(key) if answers is not None and not question.supposed else None
                passage = max(1.0, count(question.passage))
                asked += 1
                if answer is not None:
                    cost.known += weight
                    lengths[question.kind].append((answer.completion_tokens or count(answer.text)) / passage)
                    continue
                prompt = sum(_prompt_tokens(message["content"], count) for message in question.messages)
                open_.append((weight * question.times, question.kind, prompt, passage))
                shares[question.kind] = question.share
    finally:
        if answers is not None:
            answers.close()
    for weight, kind, prompt, passage in open_:
        known = lengths[kind]
        share = sum(known) / len(known) if known else shares[kind]
        cost.calls += weight
        cost.prompt_tokens += weight * prompt
        cost.answer_tokens += weight * min(share * passage + 8, endpoint.max_tokens)
    cost.measured = sum(map(len, lengths.values())) / asked if asked else 0.0
    cost.most_calls = cost.calls * (1 if step.asks_all else step.parameters.tries)
    prices = (
        endpoint.input_price if rates.input_price is None else rates.input_price,
        endpoint.output_price if rates.output_price is None else rates.output_price,
    )
    cost.price = (cost.prompt_tokens * prices[0] + cost.answer_tokens * prices[1]) / 1e6
    limits = [
        cost.calls / endpoint.requests_per_minute / 60 if endpoint.requests_per_minute else None,
        (cost.prompt_tokens + cost.answer_tokens) / endpoint.tokens_per_minute / 60
        if endpoint.tokens_per_minute
        else None,
        cost.answer_tokens / rates.tokens_a_second / 3600 if rates.tokens_a_second else None,
    ]
    cost.hours = max((hours for hours in limits if hours is not None), default=None)
    return cost


def _prompt_tokens(content: str | list[dict[str, Any]], count: Callable[[str], float]) -> float:
    """Of a message, with its pictures."""
    if isinstance(content, str):
        return count(content)
    return sum(count(part["text"]) if part["type"] == "text" else IMAGE_TOKENS for part in content)


def _counter(tokenizer: Path | None) -> Callable[[str], float]:
    if tokenizer is None:
        return lambda text: len(text) / CHARACTERS_A_TOKEN
    measure = measure_of(tokenizer)
    return lambda text: float(measure([text])[0])


def as_json(plan: CostPlan) -> dict[str, Any]:
    """The plan as plain values."""
    return {
        "steps": [vars(step) for step in plan.steps],
        "sampled": plan.sampled,
        "documents": plan.documents,
        "dropped": plan.dropped,
        "tokens": "counted" if plan.tokenizer else f"{CHARACTERS_A_TOKEN:g} characters each",
        "taken to drop nothing": plan.passed_over,
    }
