"""A model behind an OpenAI-compatible server: asked many at a time, no faster than agreed, again when that may help.

What can go wrong has a name (`Trouble.kind`), and the name says what is done: a server that is busy, broken or slow
is asked again after a growing pause; one that refuses a question is not; one that refuses the key, or is not there,
ends the run, and what it has answered so far is on disk.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
from pydantic import Field, field_validator

from megatron_davinci.config.section import Section
from megatron_davinci.darwin.answers import Answer
from megatron_davinci.darwin.events import Broken, Events, tokens_of
from megatron_davinci.errors import ConfigError, EnvironmentProblem

AGAIN = {"rate_limited", "server_error", "timeout", "connection", "cut_stream", "not_json", "wrong_shape"}
_FIRST_PAUSE, _LONGEST_PAUSE, _LONGEST_WISH = 0.5, 60.0, 300.0  # seconds
_UNANSWERED = 20  # questions in a row: it is not the question
_PROBE_SECONDS = 10.0
_SAID = 300  # characters of what a server says that are shown
_NEWER_LIMIT = "max_completion_tokens"  # OpenAI's models that think take no `max_tokens`
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Endpoint(Section):
    """Where a model is, what it is told besides the prompt, and how hard it may be asked.

    Attributes:
        url: Up to and with `/v1`, as servers print it.
        model: As the server calls it. Answers are kept by this name, whatever the url.
        key_variable: Environment variable with the API key; None where none is wanted. A key stands nowhere else.
        temperature: Of sampling.
        seed: Of sampling; each further try at a chunk adds one.
        max_tokens: Of one answer. A server that refuses the field, and names `max_completion_tokens`, is sent that.
        extra: Further fields of the request, as `reasoning_effort` or `chat_template_kwargs`.
        structured: How the server is told the form of an answer, so that tokens against it are never written: `vllm`
            (`davinci serve` too) by `structured_outputs`, `sglang` by `regex`; None to say it in the prompt only.
        stream: Let answers come in pieces. What they are is the same; a gateway that ends silent connections has
            none to end, and an answer without end is dropped at `response_bytes`.
        concurrency: Requests at a time, over all workers.
        requests_per_minute: Likewise; None for no limit.
        tokens_per_minute: Of prompts and answers together; None for no limit.
        requests: Most requests for one answer, the first one included.
        timeout: Seconds for one request, from the connection to the last byte.
        response_bytes: Most bytes of one response.
        input_price: Of a million prompt tokens, in any currency.
        output_price: Of a million answer tokens.
    """

    url: str
    model: str = Field(min_length=1)
    key_variable: str | None = None
    temperature: float = Field(default=0.0, ge=0)
    seed: int = 0
    max_tokens: int = Field(default=4096, gt=0)
    extra: dict[str, Any] = Field(default={})
    structured: Literal["vllm", "sglang"] | None = None
    stream: bool = False
    concurrency: int = Field(default=16, gt=0)
    requests_per_minute: float | None = Field(default=None, gt=0)
    tokens_per_minute: float | None = Field(default=None, gt=0)
    requests: int = Field(default=6, gt=0)
    timeout: float = Field(default=300.0, gt=0)
    response_bytes: int = Field(default=4_000_000, gt=0)
    input_price: float = Field(default=0.0, ge=0)
    output_price: float = Field(default=0.0, ge=0)

    @field_validator("url")
    @classmethod
    def _is_a_url_without_secrets(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("should begin with http:// or https://, as http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "should hold no key, password or query; name an environment variable as key_variable"
            )
        return value.rstrip("/")

    @property
    def decides(self) -> dict[str, Any]:
        """What of it decides an answer."""
        named = {"model", "temperature", "seed", "max_tokens", "extra"}
        return self.model_dump(
            mode="json", include=named if self.structured is None else {*named, "structured"}
        )

    def fields_of(self, form: str | None) -> dict[str, Any]:
        """Fields of a request for an answer of a form, a regular expression; none where it is not told."""
        if form is None or self.structured is None:
            return {}
        return {"structured_outputs": {"regex": form}} if self.structured == "vllm" else {"regex": form}


class Trouble(Exception):
    """A question that got no answer.

    Attributes:
        kind: What it was, in a word that is counted.
        said: What the server said, without the key.
        wait: Seconds that the server wants us to wait.
    """

    def __init__(self, kind: str, said: str = "", wait: float = 0.0) -> None:
        super().__init__(f"{kind}: {said}")
        self.kind, self.said, self.wait = kind, said, wait


class Client:
    """Asks one model. It belongs to one event loop.

    Args:
        endpoint: The model.
        processes: Among which the endpoint's limits are divided.

    Attributes:
        counts: Requests, by what came of each.

    Raises:
        ConfigError: The environment has no key under the variable that the endpoint names.
    """

    def __init__(self, endpoint: Endpoint, processes: int = 1) -> None:
        self.endpoint, self.counts = endpoint, Counter[str]()
        self._key = api_key(endpoint)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        concurrency = max(1, endpoint.concurrency // processes)
        self._free = asyncio.Semaphore(concurrency)
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=endpoint.timeout,
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            trust_env=urlsplit(endpoint.url).hostname not in _LOOPBACK,
        )
        self._requests = Bucket(endpoint.requests_per_minute, processes, burst=1.0)
        self._tokens = Bucket(endpoint.tokens_per_minute, processes, burst=None)
        self._not_before, self._limit = 0.0, "max_tokens"
        self._failed = 0  # requests since the last answer
        self._unanswered = 0  # questions likewise

    async def close(self) -> None:
        """Let go of the connections."""
        await self._http.aclose()

    async def ask(self, messages: list[dict[str, Any]], attempt: int = 0, form: str | None = None) -> Answer:
        """Ask until there is an answer, or no sense in it.

        Args:
            messages: Of the chat.
            attempt: Added to the seed.
            form: Regular expression that the answer is to follow; None for any answer.

        Raises:
            Trouble: This question gets no answer.
            ConfigError: The server refuses the key, or does not know the model.
            EnvironmentProblem: The server is not there, or answers nothing that it is asked.
        """
        last = Trouble("timeout")
        for number in range(self.endpoint.requests):
            if number:
                pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (number - 1)) * random.uniform(0.5, 1.0)
                await asyncio.sleep(max(pause, last.wait))
            try:
                answer = await self._once(messages, attempt, form)
            except Trouble as trouble:
                last = trouble
                self.counts[trouble.kind] += 1
                self._failed += 1
                if trouble.kind not in AGAIN:
                    break
                continue
            self.counts["answered"] += 1
            self._failed = self._unanswered = 0
            return answer
        self._unanswered += 1
        if self._unanswered >= _UNANSWERED:
            raise self._gives_no_answers(last)
        if last.kind in AGAIN and self._failed >= self.endpoint.requests and not await self._is_there():
            raise EnvironmentProblem(
                "A model's server does not answer.",
                where=self.endpoint.url,
                found=f"{self.endpoint.requests} requests, the last: {last.kind}"
                + (f": {last.said}" if last.said else ""),
                expected="an OpenAI-compatible server",
                do="start the server, then the same command again: answers so far are kept",
            )
        raise last

    async def _once(self, messages: list[dict[str, Any]], attempt: int, form: str | None) -> Answer:
        endpoint = self.endpoint
        body = {
            **endpoint.extra,
            **endpoint.fields_of(form),
            "model": endpoint.model,
            "messages": messages,
            "temperature": endpoint.temperature,
            "seed": endpoint.seed + attempt,
            "stream": endpoint.stream,
        }
        if endpoint.stream:
            body["stream_options"] = {"include_usage": True}
        async with self._free:
            while (left := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(left)
            await self._requests.take(1.0)
            await self._tokens.take(0.0)
            try:
                async with asyncio.timeout(endpoint.timeout):
                    answer = await self._post_limited(body)
            except (TimeoutError, httpx.TimeoutException):
                raise Trouble("timeout", f"no whole answer in {endpoint.timeout:g} seconds") from None
            except httpx.HTTPError as error:
                raise Trouble("connection", self._shown(f"{type(error).__name__}: {error}")) from None
            except Trouble as trouble:
                if trouble.kind == "rate_limited":  # for all that ask, not only this one
                    self._not_before = max(self._not_before, time.monotonic() + trouble.wait)
                raise
            self._tokens.spend(answer.prompt_tokens + answer.completion_tokens)
            return answer

    async def _post_limited(self, body: dict[str, Any]) -> Answer:
        """Post a request with the limit of an answer under the name that the server takes."""
        name, most = self._limit, self.endpoint.max_tokens
        try:
            return await self._post({**body, name: most})
        except Trouble as trouble:
            if trouble.kind != "refused" or name == _NEWER_LIMIT or _NEWER_LIMIT not in trouble.said:
                raise
        self._limit = _NEWER_LIMIT
        return await self._post({**body, _NEWER_LIMIT: most})

    async def _post(self, body: dict[str, Any]) -> Answer:
        url, content, events = f"{self.endpoint.url}/chat/completions", bytearray(), Events()
        async with self._http.stream("POST", url, json=body) as response:
            kind = response.headers.get("content-type", "")
            in_pieces = response.status_code == 200 and kind.startswith("text/event-stream")
            try:
                read = 0
                async for block in response.aiter_bytes():
                    if (read := read + len(block)) > self.endpoint.response_bytes:
                        raise Trouble("too_large", f"more than {self.endpoint.response_bytes:,} bytes")
                    if not in_pieces:
                        content += block
                        continue
                    events.add(block)
                if in_pieces:
                    return events.answer()
            except Broken as broken:
                raise Trouble(broken.kind, self._shown(broken.said)) from None
            except (httpx.RemoteProtocolError, httpx.ReadError) as error:
                if events.done:
                    return events.answer()
                if in_pieces:
                    said = f"after {events.number} events: {error}"
                    raise Trouble("cut_stream", self._shown(said)) from None
                raise
        if response.status_code != 200:
            said = self._shown(content.decode("utf-8", "replace"))
            self._raise_for(response.status_code, said, response.headers)
        return answer_of(bytes(content))

    def _raise_for(self, status: int, said: str, headers: httpx.Headers) -> None:
        found = f"{status} {said}".strip()
        if status in (401, 403):
            named = self.endpoint.key_variable
            raise ConfigError(
                "A model's server refuses the key.",
                where=self.endpoint.url,
                found=found,
                expected=f"a valid key in the variable {named}" if named else "a server that wants no key",
                do=None if named else "name the environment variable that holds the key as `key_variable`",
            )
        if status == 404:
            raise ConfigError(
                "A model's server does not know the model, or the path.",
                where=f"{self.endpoint.url}/chat/completions",
                found=found,
                expected=f"a server of {self.endpoint.model!r}",
                do="compare `url` and `model` with what the server printed when it started",
            )
        if status == 429:
            raise Trouble("rate_limited", said, _seconds(headers.get("retry-after")))
        if status >= 500 or status in (408, 409, 425):
            raise Trouble("server_error", found, _seconds(headers.get("retry-after")))
        raise Trouble("refused", found)

    def _gives_no_answers(self, last: Trouble) -> EnvironmentProblem:
        return EnvironmentProblem(
            "A model's server has not answered one question of many.",
            where=self.endpoint.url,
            found=f"{self._unanswered} in a row, the last: {last.kind}: {last.said}",
            expected="a server that takes the model, its `extra` fields and `max_tokens`, and has quota left",
            do="mend the step's `endpoint`, or the server; then start the same command again: answers are kept",
        )

    async def _is_there(self) -> bool:
        """Whether the server answers anything: then it is one question that it has no answer to."""
        try:
            async with asyncio.timeout(_PROBE_SECONDS):
                response = await self._http.get(f"{self.endpoint.url}/models", timeout=_PROBE_SECONDS)
        except (TimeoutError, httpx.HTTPError):
            return False
        return response.status_code < 500 and response.status_code != 429

    def _shown(self, said: str) -> str:
        """What a server says, on one line, without the key that it may repeat."""
        if self._key:
            said = said.replace(self._key, "[key]")
        return " ".join(said.split())[:_SAID]


class Bucket:
    """A limit of something a minute. What is not known before is taken after: the next one waits for it.

    Args:
        per_minute: The limit; None for none.
        processes: That share it.
        burst: Most that may be saved up; None for a sixth of a minute's.
    """

    def __init__(self, per_minute: float | None, processes: int, burst: float | None) -> None:
        self._rate = None if per_minute is None else per_minute / processes / 60
        self._most = (10 * self._rate if burst is None else burst) if self._rate else 0.0
        self._have, self._at = self._most, time.monotonic()

    async def take(self, amount: float) -> None:
        """Wait until there is so much, and take it."""
        if self._rate is None:
            return
        self._fill()
        self._have -= amount
        if self._have < 0:
            await asyncio.sleep(-self._have / self._rate)

    def spend(self, amount: float) -> None:
        """Take without waiting."""
        if self._rate is not None:
            self._fill()
            self._have -= amount

    def _fill(self) -> None:
        now = time.monotonic()
        self._have = min(self._most, self._have + (now - self._at) * (self._rate or 0.0))
        self._at = now


def api_key(endpoint: Endpoint) -> str | None:
    """The key out of the environment.

    Raises:
        ConfigError: The variable is not set, or holds what no header can.
    """
    if endpoint.key_variable is None:
        return None
    key = os.environ.get(endpoint.key_variable, "").strip()
    if not key or not key.isascii() or any(mark.isspace() for mark in key):
        raise ConfigError(
            "There is no API key in the environment.",
            where=endpoint.key_variable,
            found="nothing" if not key else "something with blanks, or characters beyond ASCII",
            expected=f"the key of {endpoint.url}",
            do=f"export {endpoint.key_variable}=...",
        )
    return key


def answer_of(content: bytes) -> Answer:
    """The answer in the body of a response.

    Raises:
        Trouble: It is `not_json`, or of the `wrong_shape`.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Trouble("not_json", f"{len(content):,} bytes: {str(error)[:_SAID]}") from None
    try:
        choice = body["choices"][0]
        text = choice["message"].get("content")
        if text is None and choice.get("finish_reason"):
            text = ""  # it ended in the midst of its thoughts: an answer that says nothing, as in a stream
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Trouble("wrong_shape", "no choices[0].message.content") from None
    if not isinstance(text, str):
        raise Trouble("wrong_shape", f"choices[0].message.content is {type(text).__name__}")
    usage = body.get("usage")
    tokens = tokens_of(usage if isinstance(usage, dict) else {})
    return Answer(text, str(choice.get("finish_reason") or "stop")[:40], *tokens)


def _seconds(header: str | None) -> float:
    try:
        return min(_LONGEST_WISH, max(0.0, float(header or 0)))
    except ValueError:
        return 0.0  # a date; the pause that grows anyway serves
