"""A proxy between a job and a model's server that spoils what passes, as networks, servers and models do.

Faults of the way (429, 500, cut, garbled, slow, dropped) are drawn anew for each request: asked again, a question may
get through. Faults of the model (a text that repeats itself for ever) belong to the question, as they do to a model
that always loops there.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

FAULTS = ("rate", "error", "cut", "garbled", "slow", "dropped")
OF_STREAMS = ("unfinished",)  # besides


class Proxy(ThreadingHTTPServer):
    """Passes requests on to `upstream`.

    Attributes:
        share: Of requests that a fault of the way hits.
        loops: Share of questions whose answer repeats itself; half of those until the connection is cut off by size.
        delivered: Answers that were sent whole, by a hash of the question.
        faults: How often each fault was done.
        kinds: Faults of the way that it does.
        slow: Seconds of a slow answer.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str, seed: int, share: float = 0.0, loops: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.seed, self.share, self.loops = upstream, seed, share, loops
        self.kinds, self.slow = FAULTS, 1.5
        self.delivered: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.requests = 0
        self._draw, self._lock = random.Random(seed), threading.Lock()
        self.client = httpx.Client(timeout=120, trust_env=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def fault(self, key: str) -> str:
        """What goes wrong with a request."""
        with self._lock:
            self.requests += 1
            chosen = self._draw.choice(self.kinds) if self._draw.random() < self.share else ""
            if not chosen:
                place = int(hashlib.sha256(f"{self.seed} {key}".encode()).hexdigest()[:8], 16) / 16**8
                chosen = "" if place >= self.loops else "endless" if place < self.loops / 2 else "looping"
            self.faults[chosen or "none"] += 1
            return chosen

    def handle_error(self, request, client_address) -> None:
        """A client that is gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        found = self.server.client.get(self.server.upstream + self.path.removeprefix("/v1"))
        self.reply(found.status_code, found.content)

    def do_POST(self) -> None:
        proxy = self.server
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(raw)
        key = hashlib.sha256(json.dumps([body["messages"], body["seed"]]).encode()).hexdigest()
        fault, kind = proxy.fault(key), dict[str, str]()
        if fault == "rate":
            return self.reply(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0.05"})
        if fault == "error":
            return self.reply(500, b"<html>Internal Server Error</html>")
        if fault == "dropped":
            self.close_connection = True
            return None
        if fault == "endless":
            kind = {"Content-Type": "text/event-stream"} if body["stream"] else {}
            return self.reply(200, b'data: {"choices": [{"content": "' + b"and on and on " * 60_000, kind)
        if fault == "looping":
            said = {"message": {"content": "<passage>" + "and so on, and " * 400}, "finish_reason": "length"}
            answer, status = json.dumps({"choices": [said]}).encode(), 200
        else:
            found = proxy.client.post(proxy.upstream + self.path.removeprefix("/v1"), content=raw)
            answer, status = found.content, found.status_code
            if found.headers["content-type"].startswith("text/event-stream"):
                kind = {"Content-Type": "text/event-stream"}
                if fault == "garbled":  # one event of many
                    middle = answer.index(b"{", len(answer) // 2)
                    answer = answer[: middle + 1] + b"\x15" + answer[middle + 1 :]
                    return self.reply(status, answer, kind)
                if fault == "unfinished":  # it ends as if all were well, and is not done
                    return self.reply(status, answer[: answer.rindex(b"data: [DONE]")], kind)
        if fault == "slow":
            time.sleep(proxy.slow)
        if fault == "garbled":
            return self.reply(status, bytes(byte ^ 0x15 for byte in answer))
        if fault == "cut":
            self.send_response(status)
            for name, value in {"Content-Length": str(len(answer)), **kind}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer[: len(answer) // 2])
            self.close_connection = True
            return None
        self.reply(status, answer, kind)
        with proxy._lock:
            proxy.delivered[key] += status == 200 and fault != "slow"
        return None

    def reply(self, status: int, raw: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)
        self.wfile.flush()


@contextmanager
def between(upstream: str, seed: int, share: float = 0.0, loops: float = 0.0) -> Iterator[Proxy]:
    """A proxy, for as long as the block runs."""
    proxy = Proxy(upstream, seed, share, loops)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        proxy.client.close()
