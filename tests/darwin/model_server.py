"""An OpenAI-compatible server on loopback whose model is a function, with faults on demand; it counts."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("429", "500", "cut", "garbled", "shape", "slow")


def passage(content: str) -> tuple[str, str]:
    """What stands between the last pair of marks of a prompt, and the mark."""
    mark, text = re.findall(r"<(passage\d*)>\n(.*?)\n</\1>", content, re.DOTALL)[-1]
    return text, mark


def cleaner(content: str) -> str:
    """A faithful model: lines that are page numbers go, torn words are put together."""
    text, mark = passage(content)
    text = re.sub(r"(?m)^Page \d+\n?", "", text)
    text = re.sub(r"-\n(?=[a-z])", "", text)
    return f"<{mark}>{text}</{mark}>"


class Server(ThreadingHTTPServer):
    """Answers by `model`; `fault` says of each request what goes wrong instead, or nothing."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model: Callable[[str], str] = cleaner
        self.fault: Callable[[], str] = lambda: ""
        self.delay, self.finish, self.down = 0.0, "stop", False
        self.requests: list[dict] = []
        self.answered: Counter[tuple[str, int]] = Counter()
        self.keys: set[str | None] = set()
        self.lock, self.at_once, self.most_at_once = threading.Lock(), 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def endpoint(self, **more) -> dict:
        return {"url": self.url, "model": "tiny-1", "timeout": 0.5, **more}

    def forget(self) -> None:
        self.requests, self.answered, self.most_at_once = [], Counter(), 0

    def handle_error(self, request, client_address) -> None:
        """A client that is gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(503 if self.server.down else 200, b'{"data": []}')

    def do_POST(self) -> None:
        server: Server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(body)
            server.keys.add(self.headers.get("Authorization"))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            fault = server.fault()
        try:
            time.sleep(server.delay)
            self.answer(server, body, fault)
        finally:
            with server.lock:
                server.at_once -= 1

    def answer(self, server: Server, body: dict, fault: str) -> None:
        content = body["messages"][-1]["content"]
        if not isinstance(content, str):  # with pictures in it
            content = json.dumps(content)
        if fault.isdigit():
            return self.reply(
                int(fault), f"no: {self.headers.get('Authorization')}".encode(), {"Retry-After": "0"}
            )
        if fault == "garbled":
            return self.reply(200, b'{"choices": [{"mess')
        if fault == "shape":
            return self.reply(200, b'{"choices": [{"message": {"content": null}}]}')
        if fault == "slow":
            time.sleep(0.6)
        if fault == "endless":
            return self.reply(200, b" " * 300_000)
        said = {
            "choices": [{"message": {"content": server.model(content)}, "finish_reason": server.finish}],
            "usage": {"prompt_tokens": len(content) // 4, "completion_tokens": 7},
        }
        if body["stream"]:
            with server.lock:
                server.answered[content, body["seed"]] += not fault
            return self.stream(said, fault)
        raw = json.dumps(said).encode()
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw[: len(raw) // 2])
            self.close_connection = True
            return None
        with server.lock:
            server.answered[content, body["seed"]] += 1
        return self.reply(200, raw)

    def stream(self, said: dict, fault: str) -> None:
        """The same answer in pieces of three characters; a fault is met in the middle of them."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        text = said["choices"][0]["message"]["content"]
        events = [{"choices": [{"delta": {"content": text[at : at + 3]}}]} for at in range(0, len(text), 3)]
        events += [{"choices": [{"delta": {}, "finish_reason": said["choices"][0]["finish_reason"]}]}]
        events += [{"choices": [], "usage": said["usage"]}]
        raw = [f"data: {json.dumps(event)}\n\n".encode() for event in events] + [b"data: [DONE]\n\n"]
        faulty = {
            "stream_garbled": b'data: {"choices": [{"delta"\n\n',
            "stream_shape": b"data: {}\n\n",
            "stream_error": b'data: {"error": {"message": "out of memory"}}\n\n',
        }
        if fault in faulty:
            raw[2:] = [faulty[fault]]
        elif fault == "stream_unfinished":
            raw[-3:-2] = []
        elif fault.startswith("stream_"):
            raw = raw[:3] if fault == "stream_cut" else raw[:-1]
        # Lines end as they like, and nothing is sent in whole events.
        whole = b": a comment\r\n\r\n" + b"".join(raw).replace(b"\n", b"\r\n")
        for at in range(0, len(whole), 37):
            part = whole[at : at + 37]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        if fault == "stream_cut":
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def reply(self, status: int, raw: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)


@contextmanager
def serving() -> Iterator[Server]:
    """A server, for as long as the block runs."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def at_random(seed: int, share: float) -> Callable[[], str]:
    """Faults of every kind, a share of all requests."""
    draw = random.Random(seed)
    return lambda: draw.choice(FAULTS[:5]) if draw.random() < share else ""
