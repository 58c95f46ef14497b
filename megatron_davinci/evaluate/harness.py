"""lm-eval's view of a checkpoint: its `LM`, on an `Engine`, with what was answered before kept on disk.

Text becomes tokens as lm-eval's own `hf` model has it: a continuation is what the whole text has behind the tokens of
its context; what does not fit into the model's length is cut from the left; a text by itself is scored in windows
that do not overlap, each after one token. So both give the same numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.evaluate.answers import Answers
from megatron_davinci.evaluate.endings import ends
from megatron_davinci.evaluate.engine import Likelihood
from megatron_davinci.evaluate.texts import pairs_of, spaces_moved

DEFAULT_MOST = 256  # tokens to generate, where a task does not say; as in lm-eval
Pair = tuple[list[int], list[int]]


class Ranks(Protocol):
    """All ranks' engines, as rank 0 calls them."""

    def log_likelihoods(self, requests: Sequence[Pair]) -> list[Likelihood]:
        """As `Engine.log_likelihoods`."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], until: Sequence[Sequence[str]], most: Sequence[int]
    ) -> list[list[int]]:
        """As `Engine.generate`, with the strings that end each text."""
        ...


@dataclass
class Troubles:
    """What went wrong with single items, by what it was.

    Attributes:
        items: (task, document) of each, by the kind of trouble.
    """

    items: dict[str, list[tuple[str, int]]] = field(default_factory=dict)

    def add(self, kind: str, request: Instance) -> None:
        """Note an item, once."""
        one = (request.task_name or "", request.doc_id if request.doc_id is not None else -1)
        if one not in (known := self.items.setdefault(kind, [])):
            known.append(one)

    def counts(self) -> dict[str, int]:
        """How many items, by kind."""
        return {kind: len(items) for kind, items in self.items.items()}


# What is wrong with an item whose answer says nothing about the model; a score must not be made of it.
EMPTY = "empty text"
TOO_LONG = "longer than the model"
NOT_A_NUMBER = "logits that are not numbers"
SAMPLED = "asks for sampling"
NO_ROOM = "no room to generate"
# An answer that says something about the model.
ENDLESS = "generation that did not stop"
FATAL = (EMPTY, TOO_LONG, NOT_A_NUMBER, SAMPLED, NO_ROOM)


class NativeLM(TemplateLM):
    """A Megatron-Core checkpoint as lm-eval calls it. One process has it; the ranks follow.

    Args:
        ranks: The engines.
        tokenizer: The model's.
        longest: `max_sequence_length`.
        answers: What was answered before, and where answers are kept.

    Attributes:
        troubles: What went wrong with single items since `begin`.
    """

    def __init__(self, ranks: Ranks, tokenizer: Tokenizer, longest: int, answers: Answers) -> None:
        super().__init__()
        self._ranks, self._tokenizer, self._longest, self._answers = ranks, tokenizer, longest, answers
        self.troubles = Troubles()

    def begin(self) -> None:
        """Forget the troubles of another task."""
        self.troubles = Troubles()

    @property
    def max_length(self) -> int:
        """The model's length."""
        return self._longest

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document, which also stands before a text that has nothing before it."""
        return self._tokenizer.eod_id

    @property
    def tokenizer_name(self) -> str:
        """For caches of requests."""
        return self._tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, without special tokens."""
        ids: list[int] = self._tokenizer.encode_batch([string])[0].tolist()
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether it is what greedy decoding gives."""
        moved = [spaces_moved(*request.args) for request in requests]
        encoded = pairs_of(self._tokenizer, moved)
        pairs = [self._checked(request, pair) for request, pair in zip(requests, encoded, strict=True)]
        return self._likelihoods("loglikelihood", requests, pairs)

    def ask(self, texts: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """The same of texts that no task of lm-eval asks: NaN where one is empty or longer than the model."""
        return self.loglikelihood(
            [Instance("loglikelihood", {}, text, number) for number, text in enumerate(texts)]
        )

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("`loglikelihood` does not go through it")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, token by token, as much as fits before each."""
        encoded = self._tokenizer.encode_batch([request.args[0] for request in requests])
        pairs: list[Pair | None] = []
        owners: list[Instance] = []
        counts = []
        for request, ids in zip(requests, encoded, strict=True):
            windows = [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(ids.tolist(), self.eot_token_id, self._longest, 1)
            ]
            if not windows:
                self.troubles.add(EMPTY, request)
            pairs += [(list(before), list(rest)) for before, rest in windows]
            owners += [request] * len(windows)
            counts.append(len(windows))
        found = iter(self._likelihoods("loglikelihood_rolling", owners, pairs))
        return [sum(next(found)[0] for _ in range(count)) if count else float("nan") for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each prompt greedily, up to the first of its ends."""
        end = self._tokenizer.decode([self.eot_token_id])
        encoded = self._tokenizer.encode_batch([request.args[0] for request in requests])
        texts: list[str | None] = [None] * len(requests)
        asked: list[tuple[int, list[int], list[str], int]] = []
        for number, (request, ids) in enumerate(zip(requests, encoded, strict=True)):
            settings = normalize_gen_kwargs(copy.deepcopy(request.args[1]), DEFAULT_MOST)
            until = handle_stop_sequences(settings.get("until"), eos=end)
            most, room = settings["max_gen_toks"], self._longest - settings["max_gen_toks"]
            if settings.get("do_sample") or not len(ids) or room <= 0:
                trouble = SAMPLED if settings.get("do_sample") else EMPTY if not len(ids) else NO_ROOM
                self.troubles.add(trouble, request)
                texts[number] = ""
            else:
                asked.append((number, ids[-room:].tolist(), [text for text in until if text], most))
        keys = [("generate_until", ids, until, most) for _, ids, until, most in asked]

        def compute(places: Sequence[int]) -> list[list[int]]:
            chosen = [asked[place] for place in places]
            return self._ranks.generate(
                [ids for _, ids, _, _ in chosen],
                [until for _, _, until, _ in chosen],
                [most for *_, most in chosen],
            )

        for (number, _, until, most), ids in zip(asked, self._answers.of(keys, compute), strict=True):
            request = requests[number]
            if ids and ids[-1] < 0:
                self.troubles.add(NOT_A_NUMBER, request)
                ids = ids[:-1]
            elif len(ids) >= most and not ends(self._tokenizer, ids, until):
                self.troubles.add(ENDLESS, request)
            text = self._tokenizer.decode(ids, special=False)
            texts[number] = postprocess_generated_text(text, until, None)
        return [text or "" for text in texts]

    def _checked(self, request: Instance, pair: Pair) -> Pair | None:
        context, continuation = pair
        if not continuation or not context:
            self.troubles.add(EMPTY, request)
            return None
        if len(continuation) > self._longest:
            self.troubles.add(TOO_LONG, request)
            return None
        room = self._longest + 1 - len(continuation)
        return context[-room:], continuation

    def _likelihoods(
        self, kind: str, requests: Sequence[Instance], pairs: Sequence[Pair | None]
    ) -> list[tuple[float, bool]]:
        asked = [(number, pair) for number, pair in enumerate(pairs) if pair is not None]
        keys = [("loglikelihood", *pair) for _, pair in asked]
        found = self._answers.of(
            keys,
            lambda places: [
                [one.log, one.greedy]
                for one in self._ranks.log_likelihoods([asked[place][1] for place in places])
            ],
        )
        answers = [(float("nan"), False)] * len(pairs)
        for (number, _), (log, greedy) in zip(asked, found, strict=True):
            answers[number] = (log, greedy)
            if not abs(log) < float("inf"):
                self.troubles.add(NOT_A_NUMBER, requests[number])
        return answers
