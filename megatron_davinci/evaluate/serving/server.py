"""An OpenAI-compatible server of one model: threads talk to clients, the thread that has the model writes batches.

`POST /v1/chat/completions`, `POST /v1/completions`, `GET /v1/models`, `GET /health`. Answers come whole, or with
`stream` in pieces, as server-sent events. It stands on http.server: behind it is one small model, and what limits it
is the model.
"""

from __future__ import annotations

import hmac
import json
import select
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue
from threading import Condition, Thread
from typing import Any
from urllib.parse import unquote

from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.evaluate.serving.forms import UNFIT
from megatron_davinci.evaluate.serving.pieces import Pieces, text_of
from megatron_davinci.evaluate.serving.queue import Job, Queue
from megatron_davinci.evaluate.serving.requests import Refusal, asked, parsed, streamed
from megatron_davinci.evaluate.serving.writers import Writer

_IDLE_SECONDS = 75.0  # of a connection without a request, or in the middle of one
_LAST_SECONDS = 5.0  # in which the last answers are sent
_POSTS = ("/v1/chat/completions", "/v1/completions")


@dataclass(frozen=True)
class Settings:
    """How a model is served.

    Attributes:
        name: Of the model.
        host: To listen at.
        port: Likewise; 0 for a free one.
        batch: Texts that are written at once. With 1 the same question has the same answer, whatever else is asked.
        waiting: Texts that wait at most; more are refused with 503.
        body_bytes: Of one request at most.
        key: That clients must show; None for none.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    batch: int = 16
    waiting: int = 256
    body_bytes: int = 8_000_000
    key: str | None = None


class Server:
    """Serves a model.

    Args:
        writer: The model.
        settings: How.

    Raises:
        EnvironmentProblem: It cannot listen there.

    Attributes:
        url: Up to and with `/v1`.
    """

    def __init__(self, writer: Writer, settings: Settings) -> None:
        self.writer, self.settings, self.queue = writer, settings, Queue(settings.waiting)
        try:
            self._http = _Http((settings.host, settings.port), self)
        except OSError as error:
            raise EnvironmentProblem(
                "The server cannot listen there.",
                where=f"{settings.host}:{settings.port}",
                found=error.strerror or error,
                do="name another --port; 0 takes a free one",
            ) from error
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.url = f"http://{host}:{self._http.server_address[1]}/v1"
        self.began = int(time.time())
        self._idle, self._talking = Condition(), 0

    def run(self) -> None:
        """Write what is asked for, in this thread, until `stop`."""
        thread = Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            while not self.queue.closed:
                self._write(self.queue.take(self.settings.batch))
        finally:
            self.queue.close()
            self._http.shutdown()
            thread.join()
            self._http.server_close()
            with self._idle:
                self._idle.wait_for(lambda: not self._talking, _LAST_SECONDS)

    @contextmanager
    def talking(self) -> Iterator[None]:
        """While a request is being answered: the server does not end in the middle of it."""
        with self._idle:
            self._talking += 1
        try:
            yield
        finally:
            with self._idle:
                self._talking -= 1
                self._idle.notify_all()

    def stop(self) -> None:
        """Refuse what waits, and end when what is being written is there. May be called by a signal's handler."""
        Thread(target=self.queue.close, daemon=True).start()

    def _write(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        read = {number for number, job in enumerate(jobs) if job.news is not None}

        def told(number: int, token: int) -> None:
            job = jobs[number]
            if job.news is not None and token >= 0:
                job.news.put((job.number, token))

        try:
            texts = self.writer.write([job.asked for job in jobs], told if read else None)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            for job in jobs:
                job.settle(problem=Refusal(500, f"The model failed: {said}"[:500], "server_error"))
            if not isinstance(error, RuntimeError | MemoryError):
                raise
            return
        for job, tokens in zip(jobs, texts, strict=True):
            if tokens and tokens[-1] == UNFIT:
                job.settle(
                    problem=Refusal(
                        400,
                        "The form cannot be held to: no text fits it, or it is too complex.",
                        code="form_too_complex",
                    )
                )
            elif tokens and tokens[-1] < 0:
                job.settle(problem=Refusal(500, "The model's logits are not numbers.", "server_error"))
            else:
                job.settle(tokens)

    def answer(
        self, path: str, raw: bytes, gone: Callable[[], bool]
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """The body of the response to a request, when it is there, or its events, when the first is there.

        Args:
            path: Of the request.
            raw: Its body.
            gone: Says whether the client has left.

        Raises:
            Refusal: There is none.
        """
        chat, body = path == _POSTS[0], parsed(raw)
        tokenizer = self.writer.tokenizer
        wanted = asked(
            body,
            chat,
            self.settings.name,
            self.writer.longest,
            lambda text: [int(token) for token in tokenizer.encode_batch([text])[0]],
            self.writer.forms.asked,
        )
        in_pieces, usage = streamed(body)
        news = SimpleQueue[tuple[int, int | None]]() if in_pieces else None
        jobs = [Job(each, gone, number=number, news=news) for number, each in enumerate(wanted)]
        self.queue.put(jobs)
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"chat.completion{'.chunk' if in_pieces else ''}" if chat else "text_completion",
            "created": int(time.time()),
            "model": self.settings.name,
        }
        if news is not None:
            first = news.get()  # what is refused has a status of its own, as long as nothing was sent
            if first[1] is None and (problem := jobs[first[0]].problem) is not None:
                raise problem
            return self._events(head, jobs, chat, usage, news, first)
        for job in jobs:
            job.done.wait()
            if job.problem is not None:
                raise job.problem
        choices = []
        for job in jobs:
            text, finish = text_of(tokenizer, job.tokens, job.asked.until)
            said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choices.append({"index": job.number, "finish_reason": finish, "logprobs": None} | said)
        return head | {"choices": choices, "usage": _usage(jobs)}

    def _events(
        self,
        head: dict[str, Any],
        jobs: list[Job],
        chat: bool,
        usage: bool,
        news: SimpleQueue[tuple[int, int | None]],
        first: tuple[int, int | None],
    ) -> Iterator[dict[str, Any]]:
        """The events of an answer in pieces; the error, where one is met in the middle, is the last.

        Args:
            head: What all events have.
            jobs: The texts.
            chat: Whether they are a chat's.
            usage: Whether the count of tokens is wanted behind them.
            news: Tokens of the texts, as they come.
            first: Taken of them already.
        """

        def event(number: int, text: str, finish: str | None, role: bool = False) -> dict[str, Any]:
            delta = ({"role": "assistant"} if role else {}) | ({"content": text} if text or role else {})
            said = {"delta": delta} if chat else {"text": text}
            return head | {"choices": [{"index": number, "finish_reason": finish, "logprobs": None} | said]}

        texts = [Pieces(self.writer.tokenizer, job.asked.until) for job in jobs]
        if chat:
            yield event(0, "", None, role=True)
        left, (number, token) = len(jobs), first
        while True:
            job = jobs[number]
            if token is not None:
                if piece := texts[number].add(token):
                    yield event(number, piece, None)
            elif job.problem is not None:
                yield job.problem.body
                return
            else:
                piece, finish = texts[number].rest()
                if piece:
                    yield event(number, piece, None)
                yield event(number, "", finish)
                left -= 1
                if not left:
                    break
            number, token = news.get()
        if usage:
            yield head | {"choices": [], "usage": _usage(jobs)}

    def models(self) -> dict[str, Any]:
        """The body of the list of models."""
        one = {
            "id": self.settings.name,
            "object": "model",
            "created": self.began,
            "owned_by": "megatron-davinci",
            "max_model_len": self.writer.longest,
        }
        return {"object": "list", "data": [one]}


def _usage(jobs: list[Job]) -> dict[str, int]:
    prompt, written = sum(len(job.asked.ids) for job in jobs), sum(len(job.tokens) for job in jobs)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], served: Server) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.served = served
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is no news; what else goes wrong is answered."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_SECONDS
    server: _Http

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: questions may hold what is private."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server refuses by itself, in OpenAI's form too."""
        self.close_connection = True
        self._reply(code, Refusal(code, message or "This is no request of HTTP.").body)

    def do_GET(self) -> None:
        """`/v1/models`, `/health`."""
        served, path = self.server.served, unquote(self.path.split("?")[0])
        if path == "/health":
            self._reply(200, {"status": "ok"})
        elif path in ("/v1/models", f"/v1/models/{served.settings.name}"):
            listed = served.models()
            self._guarded(lambda: listed if path == "/v1/models" else listed["data"][0])
        else:
            self._reply(404, Refusal(404, f"There is no {path}; there is /v1/models").body)

    def do_POST(self) -> None:
        """`/v1/chat/completions`, `/v1/completions`."""
        path = self.path.split("?")[0]
        if path not in _POSTS:
            self.close_connection = True
            self._reply(404, Refusal(404, f"There is no {path}; there are {' and '.join(_POSTS)}").body)
            return
        self._guarded(lambda: self.server.served.answer(path, self._body(), self._gone))

    def _guarded(self, answer: Any) -> None:
        with self.server.served.talking():
            try:
                self._authorise()
                body = answer()
            except Refusal as refusal:
                if refusal.status in (401, 411, 413):
                    self.close_connection = True  # what was sent is not read
                self._reply(refusal.status, refusal.body, refusal.wait)
                return
            except (ValueError, RecursionError) as error:
                # Of this request: others have nothing to do with it.
                said = f"The request cannot be answered: {type(error).__name__}: {error}"[:500]
                self._reply(500, Refusal(500, said, "server_error").body)
                return
            if isinstance(body, dict):
                self._reply(200, body)
            else:
                self._stream(body)

    def _stream(self, events: Iterator[dict[str, Any]]) -> None:
        """Server-sent events, in chunks of HTTP/1.1; `[DONE]` is the last, unless one of them is an error."""
        if self.request_version == "HTTP/1.0":
            self.close_connection = True  # it knows no chunks: the end is where the connection's is
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        if self.request_version != "HTTP/1.0":
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        failed = False
        for event in events:
            failed = "error" in event
            self._chunk(f"data: {json.dumps(event)}\n\n".encode())
        if not failed:
            self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _chunk(self, raw: bytes) -> None:
        self.wfile.write(raw if self.request_version == "HTTP/1.0" else b"%x\r\n%b\r\n" % (len(raw), raw))

    def _authorise(self) -> None:
        key = self.server.served.settings.key
        given = self.headers.get("Authorization", "")
        if key is not None and not hmac.compare_digest(
            given.encode("latin-1", "replace"), f"Bearer {key}".encode()
        ):
            raise Refusal(
                401, "The API key is missing or wrong.", "authentication_error", code="invalid_api_key"
            )

    def _body(self) -> bytes:
        length, most = self.headers.get("Content-Length", ""), self.server.served.settings.body_bytes
        if not length.isdecimal():
            raise Refusal(411, "A request needs a Content-Length.")
        if int(length) > most:
            raise Refusal(413, f"The body has {int(length):,} bytes, of at most {most:,}.")
        return self.rfile.read(int(length))

    def _gone(self) -> bool:
        """Whether the client has closed its side."""
        look = select.poll()
        try:
            look.register(self.connection, select.POLLIN)
            return bool(look.poll(0)) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):
            return True

    def _reply(self, status: int, body: dict[str, Any], wait: float | None = None) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        if wait is not None:
            self.send_header("Retry-After", f"{wait:g}")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)
