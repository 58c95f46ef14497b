"""A suite that needs no download: items made by rule from held-out documents, and probes made of nothing.

Each kind of multiple-choice item is asked in two ways, with the same items: which option is the likeliest, and what
the model writes. A model may know an answer and not be able to give it, and the other way round.

- `cloze_DOMAIN`: the beginning of a held-out text, one word short. Which of four words; the word.
- `choice_DOMAIN`: the beginning of a held-out text. Which of four continuations; its letter, after three examples.
- `arithmetic`: a sum, a difference or a product, after four examples. Which of four numbers; the number.
- `copying`: words twice, then their beginning. Which of four endings; the ending.
- `bytes_DOMAIN`: held-out texts, in bits a byte.

False options are of the same kind as the true one: words of the same domain and of like length, continuations of
other documents, numbers that are near, other orders of the same words. Everything follows from the texts and a seed.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_davinci.evaluate.naming import AT

ITEMS = 200  # of each kind and domain
OPTIONS = 4
LETTERS = "ABCD"
_WORD = re.compile(r"[^\W\d_]{4,}")
_BEFORE = (12, 40)  # words before a cloze's or a choice's end
_AFTER = 8  # words of a continuation
_TEXT = 4000  # characters of a text whose bits are counted

Item = dict[str, Any]


@dataclass(frozen=True)
class LocalTask:
    """A task of the suite.

    Attributes:
        name: Of its kind; with `_likelihood` or `_generation` behind it where it is asked in both ways.
        group: The domain, or `probes`.
        protocol: `likelihood`, `generation` or `text`.
        items: What is asked.
        examples: Shown before each item.
        shots: How many.
    """

    name: str
    group: str
    protocol: str
    items: list[Item]
    examples: list[Item] = field(default_factory=list)
    shots: int = 0

    def configuration(self, items: str, examples: str) -> dict[str, Any]:
        """The task in lm-eval's words.

        Args:
            items: The file with the items, JSON lines.
            examples: The file with the examples.
        """
        files = {"test": items} | ({"examples": examples} if self.examples else {})
        whole: dict[str, Any] = {
            "task": self.name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "test_split": "test",
            "num_fewshot": self.shots,
            "metadata": {"version": 1},
        }
        if self.examples:
            whole |= {"fewshot_split": "examples", "fewshot_config": {"sampler": "first_n"}}
        if self.protocol == "text":
            return whole | {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte"}],
            }
        if self.protocol == "likelihood":
            return whole | {
                "output_type": "multiple_choice",
                "doc_to_text": "{{text}}",
                "doc_to_choice": "{{options}}",
                "doc_to_target": "answer",
                "target_delimiter": "",
                "metric_list": [
                    {"metric": name, "aggregation": "mean", "higher_is_better": True}
                    for name in ("acc", "acc_norm")
                ],
            }
        return whole | {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{said}}",
            "target_delimiter": " ",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False},
            "filter_list": [
                {
                    "name": "first",
                    "filter": [
                        {"function": "regex", "regex_pattern": self.items[0]["pattern"], "fallback": ""},
                        {"function": "take_first"},
                    ],
                }
            ],
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }


def local_tasks(texts: Mapping[str, Sequence[str]], items: int = ITEMS, seed: int = 0) -> list[LocalTask]:
    """All tasks of the suite.

    Args:
        texts: Held-out texts by domain. A domain whose texts give too few items of a kind has no such task.
        items: Of each kind and domain, at most.
        seed: Of what is drawn.
    """
    tasks = []
    for domain, documents in texts.items():
        # A task with it in its name would be taken for one in another format, and left out of tables.
        name = domain.replace(AT, "_")
        tasks += _both("cloze", name, list(_cloze(documents, items, _generator("cloze", domain, seed))))
        tasks += _choices(
            name, list(_continuations(documents, items + 3, _generator("choice", domain, seed)))
        )
        bytes_ = [{"text": text[:_TEXT]} for text in documents[:items]]
        if bytes_:
            tasks.append(LocalTask(f"bytes_{name}", name, "text", bytes_))
    sums = list(_arithmetic(items + 4, _generator("arithmetic", "", seed)))
    tasks += _both("arithmetic", "probes", sums[4:], sums[:4])
    words = sorted({word for documents in texts.values() for word in _words(documents)})
    if len(words) >= 12:
        tasks += _both("copying", "probes", list(_copying(words, items, _generator("copying", "", seed))))
    return tasks


def _both(kind: str, group: str, items: list[Item], examples: Sequence[Item] = ()) -> list[LocalTask]:
    if not items:
        return []
    name = kind if group == "probes" else f"{kind}_{group}"
    return [
        LocalTask(f"{name}_{protocol}", group, protocol, items, list(examples), len(examples))
        for protocol in ("likelihood", "generation")
    ]


def _choices(domain: str, items: list[Item]) -> list[LocalTask]:
    """Continuations, by likelihood as they are and by generation as a list with letters."""
    if len(items) < OPTIONS:
        return []
    listed = [_listed(item) for item in items]
    name = f"choice_{domain}"
    return [
        LocalTask(f"{name}_likelihood", domain, "likelihood", items[3:]),
        LocalTask(f"{name}_generation", domain, "generation", listed[3:], listed[:3], 3),
    ]


def _listed(item: Item) -> Item:
    lines = [f"{letter}.{option}" for letter, option in zip(LETTERS, item["options"], strict=True)]
    text = "\n".join(["How does this go on?", item["text"], *lines, "Answer:"])
    return {"text": text, "said": LETTERS[item["answer"]], "pattern": r"^\s*([A-D])\b"}


def _cloze(documents: Sequence[str], items: int, generator: np.random.Generator) -> Iterator[Item]:
    vocabulary = sorted(set(_words(documents)))
    made = 0
    for text in documents:
        if made == items:
            return
        places = [match for match in _WORD.finditer(text) if text[match.start() - 1 : match.start()] == " "]
        # Words before a place grow with it: each text would be split once a word otherwise.
        before = places[bisect_left(places, _BEFORE[0], key=lambda at: len(text[: at.start()].split())) :]
        if not before:
            continue
        hidden = before[int(generator.integers(len(before)))]
        word = hidden[0]
        like = [other for other in vocabulary if abs(len(other) - len(word)) <= 1 and other != word]
        if len(like) < OPTIONS - 1:
            continue
        context = " ".join(text[: hidden.start()].split()[-_BEFORE[1] :])
        false = [f" {other}" for other in generator.choice(like, OPTIONS - 1, replace=False)]
        yield _item(context, f" {word}", false, generator) | {"said": word, "pattern": r"^\s*([^\W\d_]+)"}
        made += 1


def _continuations(documents: Sequence[str], items: int, generator: np.random.Generator) -> Iterator[Item]:
    least = _BEFORE[0] + _AFTER
    long = [words for text in documents if len(words := text.split()) >= least]
    if len(long) < OPTIONS:
        return
    for number, words in enumerate(long[:items]):
        others = [other for other in range(len(long)) if other != number]
        cut = int(generator.integers(_BEFORE[0], len(words) - _AFTER + 1))
        true = " " + " ".join(words[cut : cut + _AFTER])
        false = []
        for other in generator.choice(others, OPTIONS - 1, replace=False):
            begin = int(generator.integers(0, len(long[other]) - _AFTER + 1))
            false.append(" " + " ".join(long[other][begin : begin + _AFTER]))
        if len({true, *false}) == OPTIONS:
            yield _item(" ".join(words[max(0, cut - _BEFORE[1]) : cut]), true, false, generator)


def _arithmetic(items: int, generator: np.random.Generator) -> Iterator[Item]:
    seen: set[tuple[int, str, int]] = set()
    while len(seen) < min(items, 5000):
        sign = "+-*"[int(generator.integers(3))]
        most = 12 if sign == "*" else 100
        a, b = (int(n) for n in generator.integers(0, most, 2))
        if sign == "-" and b > a:
            a, b = b, a
        if (a, sign, b) in seen:
            continue
        seen.add((a, sign, b))
        true = a + b if sign == "+" else a - b if sign == "-" else a * b
        near = sorted({abs(true + d) for d in (-10, -2, -1, 1, 2, 10)} - {true})
        false = [f" {n}" for n in generator.choice(near, OPTIONS - 1, replace=False)]
        yield _item(f"{a} {sign} {b} =", f" {true}", false, generator) | {
            "said": str(true),
            "pattern": r"^\s*(-?\d+)",
        }


def _copying(words: Sequence[str], items: int, generator: np.random.Generator) -> Iterator[Item]:
    for _ in range(items):
        drawn = [str(word) for word in generator.choice(words, 6, replace=False)]
        rest = drawn[3:]
        orders = [
            [rest[i] for i in order] for order in ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
        ]
        chosen = generator.choice(len(orders), OPTIONS - 1, replace=False)
        false = [" " + " ".join(orders[i]) for i in chosen]
        line = " ".join(drawn)
        text = f"{line}\n{line}\n{' '.join(drawn[:3])}"
        yield _item(text, " " + " ".join(rest), false, generator) | {
            "said": " ".join(rest),
            "pattern": r"^\s*(.*?)\s*$",
        }


def _item(text: str, true: str, false: Sequence[str], generator: np.random.Generator) -> Item:
    """An item with its options in an order that is drawn."""
    order = generator.permutation(OPTIONS).tolist()
    options = [true, *map(str, false)]
    return {"text": text, "options": [options[place] for place in order], "answer": order.index(0)}


def _words(documents: Sequence[str]) -> Iterator[str]:
    for text in documents:
        yield from _WORD.findall(text)


def _generator(kind: str, domain: str, seed: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{kind}:{domain}:{seed}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))
