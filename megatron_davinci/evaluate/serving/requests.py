"""What a request asks for, out of the body of an OpenAI-compatible call; and why not, in OpenAI's form.

A field that would change the answer and that we do not have is refused, not passed over: who asks for tools should
not get something else without a word.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_davinci.evaluate.sampling import Sampling

MOST_STOPS = 16
_DEFAULT_COMPLETION = 16  # tokens, as in OpenAI's completions
# Fields that say nothing about the answer.
_PASSED_OVER = {"user", "metadata", "store", "service_tier", "safety_identifier"}
# Fields whose neutral values ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1, None),
    "best_of": (1, None),
    "logprobs": (False, None),
    "top_logprobs": (0, None),
    "echo": (False, None),
    "suffix": ("", None),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": ({}, None),
    "tools": ([], None),
    "tool_choice": ("none", None),
}
_ASKING = {
    "model", "temperature", "top_p", "seed", "stop", "max_tokens", "stream", "stream_options", "response_format",
    "structured_outputs",
}  # fmt: skip
_CHAT = _ASKING | {"messages", "max_completion_tokens"}
_COMPLETION = _ASKING | {"prompt"}


class Refusal(Exception):
    """A request that gets no answer.

    Args:
        status: Of HTTP.
        message: For a reader.
        kind: OpenAI's `type` of the error.
        param: The field that it is about.
        code: OpenAI's `code`.
        wait: Seconds after which to ask again; None where it makes no sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        wait: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.wait = status, wait
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Asked:
    """One text that is asked for.

    Attributes:
        ids: Tokens of the prompt, none empty.
        most: Tokens to generate at most.
        until: Strings that end the text.
        sampling: How tokens are chosen.
        form: Grammar that the text must follow; None for none.
    """

    ids: list[int]
    most: int
    until: list[str]
    sampling: Sampling
    form: str | None = None


def parsed(raw: bytes) -> dict[str, Any]:
    """The body as a mapping.

    Raises:
        Refusal: It is none.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"The body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refusal(400, f"The body should be a JSON object; found {_kind(body)}")
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        # As clients send that cut a text in the middle of a character.
        raise Refusal(400, "A text of the body has half a surrogate pair, which is no character") from None
    return body


def streamed(body: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a body asks for the answer in pieces, and for the count of tokens behind them.

    Raises:
        Refusal: It does not say so by yes or no.
    """
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise Refusal(
            400, f"stream_options should be an object; found {_kind(options)}", param="stream_options"
        )
    found = []
    for name, value in (
        ("stream", body.get("stream")),
        ("stream_options", (options or {}).get("include_usage")),
    ):
        if not isinstance(value, bool | None):
            raise Refusal(400, f"{name} should say true or false; found {value!r}"[:200], param=name)
        found.append(bool(value))
    return found[0], found[1]


def asked(
    body: Mapping[str, Any],
    chat: bool,
    model: str,
    longest: int,
    encode: Callable[[str], list[int]],
    form_of: Callable[[Mapping[str, Any]], str | None],
) -> list[Asked]:
    """What a body asks for: one text, or as many as a completion has prompts.

    Args:
        body: Of the request.
        chat: Whether it is one of `chat/completions`.
        model: The name that ours has.
        longest: Tokens of the model's context.
        encode: Text to tokens.
        form_of: The grammar of the form that a body asks for.

    Raises:
        Refusal: A field is not what it should be, or the context is too small.
    """
    _check_fields(body, _CHAT if chat else _COMPLETION)
    if body.get("model") != model:
        raise Refusal(
            404, f"There is no model {body.get('model')!r}; there is {model!r}", param="model", code="model_not_found"
        )  # fmt: skip
    temperature = _number(body, "temperature", 1.0, 0.0, 2.0)
    top_p = _number(body, "top_p", 1.0, 0.0, 1.0)
    if top_p == 0:
        raise Refusal(400, "top_p should be more than 0", param="top_p")
    seed = _integer(body, "seed", None)
    until, form = _stops(body.get("stop")), form_of(body)
    names = ("max_completion_tokens", "max_tokens") if chat else ("max_tokens",)
    name = next((name for name in names if body.get(name) is not None), names[-1])
    most = body.get(name)
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise Refusal(400, f"{name} should be an integer from 1 on; found {most!r}", param=name)
    if most is None and not chat:
        most = _DEFAULT_COMPLETION
    prompts = [_chat_text(body.get("messages"))] if chat else _prompts(body.get("prompt"))
    found = []
    for prompt in prompts:
        ids = encode(prompt) if isinstance(prompt, str) else prompt
        where = "messages" if chat else "prompt"
        if not ids:
            raise Refusal(400, f"{where} should hold some text", param=where)
        wanted = longest - len(ids) if most is None else most
        if wanted < 1 or len(ids) + wanted > longest:
            raise Refusal(
                400,
                f"This model's context is {longest} tokens. You asked for {len(ids) + max(wanted, 1)}: {len(ids)} in "
                f"the {where} and {max(wanted, 1)} to generate. Shorten the {where}, or ask for fewer tokens",
                param=where,
                code="context_length_exceeded",
            )
        # Who names no seed draws anew each time, also for one of several equal prompts.
        drawn = secrets.randbits(62) if seed is None else _seed(seed, ids)
        sampling = Sampling(temperature, top_p, drawn)
        found.append(Asked(ids, wanted, until, sampling, form))
    return found


def _check_fields(body: Mapping[str, Any], known: set[str]) -> None:
    for name, value in body.items():
        if name in known or name in _PASSED_OVER:
            continue
        if name not in _NEUTRAL:
            raise Refusal(
                400, f"There is no field {name!r}; there are {', '.join(sorted(known))}", param=name
            )
        # 0 equals False, and is another thing to ask for.
        if not any(type(value) is type(neutral) and value == neutral for neutral in _NEUTRAL[name]) and not (
            isinstance(value, float) and value == 0 and 0 in _NEUTRAL[name]
        ):
            raise Refusal(
                400, f"{name} is not supported by this server; leave it out, or set {_NEUTRAL[name][0]!r}", param=name
            )  # fmt: skip


def _seed(given: int, ids: Sequence[int]) -> int:
    """The seed of a text's generator: that of the request, and another for each prompt.

    With the same numbers for all of them a thousand questions that are answered by YES or NO, either as likely, would
    have the same answer a thousand times.
    """
    said = f"{given} {' '.join(map(str, ids))}".encode()
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest()) >> 1


def _number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Refusal(400, f"{name} should be a number from {low:g} to {high:g}; found {value!r}", param=name)
    return float(value)


def _integer(body: Mapping[str, Any], name: str, default: int | None) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refusal(400, f"{name} should be an integer; found {value!r}", param=name)
    return value


def _stops(given: Any) -> list[str]:
    stops = [] if given is None else [given] if isinstance(given, str) else given
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(text, str) and text for text in stops)
    ):
        raise Refusal(
            400, f"stop should be a string that is not empty, or up to {MOST_STOPS} of them", param="stop"
        )
    return stops


def _chat_text(messages: Any) -> str:
    """The contents of all messages, with an empty line behind each: base models have no format for chats."""
    if not isinstance(messages, list) or not messages:
        raise Refusal(
            400, f"messages should be a list of messages; found {_kind(messages)}", param="messages"
        )
    texts = []
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        ):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise Refusal(
                400,
                f"messages[{number}] should have a role and, as content, text",
                param=f"messages[{number}]",
            )
        texts.append(f"{content}\n\n")
    return "".join(texts)


def _prompts(given: Any) -> list[str]:
    prompts = [given] if isinstance(given, str) else given
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise Refusal(
            400,
            f"prompt should be a string or a list of strings (of tokens none is taken); found {_kind(given)}",
            param="prompt",
        )
    return prompts


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", type(None): "nothing"}.get(
        type(value), f"{value!r}"[:40]
    )
