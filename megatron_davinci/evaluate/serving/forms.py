"""The form that an answer must have, in the words of OpenAI's API and of vLLM's, and tokens held to it.

`response_format` asks for JSON, `structured_outputs` (vLLM's field) for a regular expression, a choice, JSON or a
grammar. Which tokens may follow is llguidance's work, which vLLM and SGLang use too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.evaluate.sampling import Draw
from megatron_davinci.evaluate.serving.requests import Asked, Refusal

_LONGEST = 100_000  # characters of a form
_KINDS = ("regex", "choice", "json", "grammar")


class Forms:
    """Forms over the tokens of one tokenizer.

    Args:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _tokens(self) -> Any:
        from llguidance import LLTokenizer

        return LLTokenizer(
            self._tokenizer.content.decode(), self._tokenizer.vocab_size, self._tokenizer.eod_id
        )

    def asked(self, body: Mapping[str, Any]) -> str | None:
        """The grammar of the form that a body asks for; None for none.

        Raises:
            Refusal: There is no such form, or two.
        """
        given = {
            name: body[name]
            for name in ("response_format", "structured_outputs")
            if body.get(name) is not None
        }
        kinds = {name: _formatted(value) if name == "response_format" else _structured(value)
                 for name, value in given.items()}  # fmt: skip
        wanted = [(name, kind) for name, kind in kinds.items() if kind is not None]
        if not wanted:
            return None
        if len(wanted) > 1:
            raise Refusal(
                400, "An answer has one form: response_format or structured_outputs.", param=wanted[1][0]
            )
        name, (kind, text) = wanted[0]
        if len(text) > _LONGEST:
            raise Refusal(400, f"{name} has {len(text):,} characters, of at most {_LONGEST:,}", param=name)
        try:
            from llguidance import LLMatcher, grammar_from
        except ImportError:
            raise Refusal(
                400, f"{name} needs llguidance where the server runs: pip install llguidance", param=name
            ) from None
        try:
            grammar = str(grammar_from(kind, text))
        except ValueError as error:
            raise Refusal(400, f"{name}: {error}"[:1000], param=name) from None
        broken, said = LLMatcher.validate_grammar_with_warnings(grammar, self._tokens)
        if broken:
            raise Refusal(400, f"{name}: {' '.join(said)}"[:1000], param=name)
        return grammar

    def matcher(self, grammar: str) -> Any:
        """What follows one text along its form."""
        from llguidance import LLMatcher

        return LLMatcher(self._tokens, grammar)


def _formatted(given: Any) -> tuple[str, str] | None:
    """OpenAI's `response_format`: the kind of form and its text; None for plain text."""
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return "json", '{"type": "object"}'
    schema = given.get("json_schema") if kind == "json_schema" else None
    if isinstance(schema, dict) and isinstance(schema.get("schema"), dict):
        return "json", json.dumps(schema["schema"])
    raise Refusal(
        400,
        "response_format should have the type text, json_object, or json_schema with a json_schema.schema",
        param="response_format",
    )


def _structured(given: Any) -> tuple[str, str]:
    """vLLM's `structured_outputs`, likewise."""
    found = (
        {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else {}
    )
    [kind, *others] = list(found) or [""]
    value = found.get(kind)
    texts = isinstance(value, list) and value and all(isinstance(each, str) and each for each in value)
    fits = (
        texts
        if kind == "choice"
        else isinstance(value, str | dict)
        if kind == "json"
        else isinstance(value, str)
    )
    if others or kind not in _KINDS or not fits:
        raise Refusal(
            400,
            "structured_outputs should have one of regex (text), choice (a list of texts), json (a schema) and "
            f"grammar (text); found {', '.join(found) or 'none'}",
            param="structured_outputs",
        )
    return kind, value if isinstance(value, str) else json.dumps(value)


UNFIT = -2  # in place of a token: the form is too complex to go on with


def chooser(
    asked: Sequence[Asked], forms: Forms, told: Callable[[int, int], None] | None = None
) -> Callable[[Sequence[int], Tensor], Tensor] | None:
    """How the next tokens are chosen; None for the likeliest ones, with nobody told.

    Args:
        asked: The texts.
        forms: Of the model's tokenizer.
        told: Is given each text's number with each of its tokens, as they are chosen.
    """
    matchers = {number: forms.matcher(one.form) for number, one in enumerate(asked) if one.form is not None}
    if told is None and not matchers and all(one.sampling.temperature == 0 for one in asked):
        return None
    draw = Draw([one.sampling for one in asked])

    def choose(numbers: Sequence[int], logits: Tensor) -> Tensor:
        held = [(row, matchers[number]) for row, number in enumerate(numbers) if number in matchers]
        if held:
            logits = logits.clone()
        for row, matcher in held:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            fits = torch.zeros(logits.shape[-1], dtype=torch.bool)
            count = min(len(bits), len(fits))
            fits[:count] = torch.from_numpy(bits[:count].astype(bool))
            logits[row].masked_fill_(~fits.to(logits.device), float("-inf"))
        chosen = draw(numbers, logits)
        for row, matcher in held:
            if (int(chosen[row]) >= 0 and not matcher.consume_token(int(chosen[row]))) or matcher.is_error():
                chosen[row] = UNFIT
        if told is not None:
            for number, token in zip(numbers, chosen.tolist(), strict=True):
                told(number, token)
        return chosen

    return choose
