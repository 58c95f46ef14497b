"""An answer that comes in pieces: server-sent events, as OpenAI's API streams chat completions.

The form is that of the standard (WHATWG HTML, section 9.2, server-sent events): fields a line, an empty line behind
each event. What ends before `[DONE]` is no answer, however much of it there is.
"""

from __future__ import annotations

import json
from typing import Any

from megatron_davinci.darwin.answers import Answer

_DONE = "[DONE]"


class Broken(Exception):
    """A stream that is no answer.

    Attributes:
        kind: `cut_stream`, `not_json`, `wrong_shape` or `server_error`.
        said: What was found.
    """

    def __init__(self, kind: str, said: str) -> None:
        super().__init__(kind, said)
        self.kind, self.said = kind, said


class Events:
    """Puts the events of one answer together, as bytes of it come."""

    def __init__(self) -> None:
        self._rest, self._data = b"", list[str]()
        self._pieces, self._finish, self._tokens = list[str](), "", [0, 0]
        self.number, self.done = 0, False

    def add(self, block: bytes) -> None:
        """Take more bytes.

        Raises:
            Broken: An event is no JSON, none of an answer, or an error.
        """
        *lines, self._rest = (self._rest + block).split(b"\n")
        for raw in lines:
            line = raw.rstrip(b"\r").decode("utf-8", "replace")
            if line.startswith("data:"):
                self._data.append(line[5:].removeprefix(" "))
            elif not line and self._data:
                data, self._data = "\n".join(self._data), []
                self._take(data)

    def answer(self) -> Answer:
        """The answer, when the last bytes have come.

        Raises:
            Broken: It was cut off, or never said why it ends.
        """
        if not self.done:
            raise Broken("cut_stream", f"the connection ended after {self.number} events, without {_DONE}")
        if not self._finish:
            raise Broken("wrong_shape", f"{self.number} events, and no finish_reason in any")
        return Answer("".join(self._pieces), self._finish, *self._tokens)

    def _take(self, data: str) -> None:
        if self.done:
            return
        if data.strip() == _DONE:
            self.done = True
            return
        self.number += 1
        try:
            event = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Broken("not_json", f"event {self.number}: {error}") from None
        if not isinstance(event, dict):
            raise Broken("wrong_shape", f"event {self.number} is no object")
        if event.get("error"):
            raise Broken("server_error", str(event["error"]))
        self._count(event.get("usage"))
        choices = event.get("choices")
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise Broken("wrong_shape", f"event {self.number} has no choices")
        for choice in choices[:1]:  # the last one may have none: it counts tokens
            delta = choice.get("delta")
            content = delta.get("content") if isinstance(delta, dict) else None
            if not isinstance(content, str | None):
                raise Broken("wrong_shape", f"event {self.number}: the content is {type(content).__name__}")
            self._pieces.append(content or "")
            self._finish = str(choice.get("finish_reason") or self._finish)[:40]

    def _count(self, usage: Any) -> None:
        if isinstance(usage, dict):
            self._tokens = tokens_of(usage)


def tokens_of(usage: dict[str, Any]) -> list[int]:
    """Tokens of the prompt and of the answer, as a server counts them; 0 where it does not say."""
    counted = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return [count if isinstance(count, int) and 0 <= count < 1 << 40 else 0 for count in counted]
