"""An S3 server on loopback, and a proxy before it that counts requests and spoils answers as a test tells it to."""

from __future__ import annotations

import http.client
import logging
import socket
import struct
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import NamedTuple

import boto3
import pytest
from botocore.config import Config
from moto.server import ThreadedMotoServer

from megatron_davinci.data.places import S3Options, S3Path

BUCKET = "bucket"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class Request(NamedTuple):
    """What the proxy was asked: `GET`, `/bucket/key`, and the first and last byte of its range."""

    method: str
    path: str
    range: tuple[int, int] | None


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


Spoil = Callable[["_Handler", Answer], "Answer | None"]
"""Makes of the server's answer the one that is sent; None if it has done something else with the connection."""


def refuse(status: int, code: str, message: str = "said by the test") -> Spoil:
    """Answer with an S3 error."""

    def spoil(handler: _Handler, answer: Answer) -> Answer:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
        return Answer(status, {"Content-Type": "application/xml"}, body.encode())

    return spoil


def cut_short(handler: _Handler, answer: Answer) -> None:
    """Promise the whole body, send half, and hang up."""
    handler.begin(answer, len(answer.body))
    handler.wfile.write(answer.body[: len(answer.body) // 2])
    handler.close_connection = True


def hang_up(handler: _Handler, answer: Answer) -> None:
    """Reset the connection without a word."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def never(handler: _Handler, answer: Answer) -> None:
    """Send nothing until the test is over."""
    handler.server.proxy.over.wait()
    handler.close_connection = True


def half_then_never(handler: _Handler, answer: Answer) -> None:
    """Send half of the body, then nothing until the test is over."""
    handler.begin(answer, len(answer.body))
    handler.wfile.write(answer.body[: len(answer.body) // 2])
    handler.wfile.flush()
    never(handler, answer)


def header(name: str, value: str | None) -> Spoil:
    """Send another header."""

    def spoil(handler: _Handler, answer: Answer) -> Answer:
        kept = {key: old for key, old in answer.headers.items() if key.lower() != name.lower()}
        return answer._replace(headers=kept | ({name: value} if value is not None else {}))

    return spoil


def fine(handler: _Handler, answer: Answer) -> Answer:
    """Let the answer pass."""
    return answer


class Proxy:
    """Passes requests on to `upstream`, notes them, and spoils the next answers by `spoils`, in order.

    Attributes:
        requests: Every request so far.
        spoils: What to do with the answers to come; when it is empty they pass.
        always: What to do with each when `spoils` is empty.
        gate: While it is not set, no answer to a GET goes out.
    """

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.upstream = upstream
        self.requests: list[Request] = []
        self.spoils: deque[Spoil] = deque()
        self.always: Spoil = fine
        self.over, self.gate, self.lock = Event(), Event(), Lock()
        self.gate.set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.daemon_threads = True
        self.server.proxy = self
        self.thread = Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def gets(self, name: str = "") -> list[tuple[int, int]]:
        """The ranges of the GETs so far, of the objects whose path ends with `name`."""
        with self.lock:
            return [
                request.range
                for request in self.requests
                if request.method == "GET" and request.range and request.path.endswith(name)
            ]

    def stop(self) -> None:
        self.over.set()
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes, which would wait for each other

    def do_GET(self) -> None:
        proxy = self.server.proxy
        asked = self.headers.get("Range")
        span = tuple(map(int, asked.removeprefix("bytes=").split("-"))) if asked else None
        with proxy.lock:
            proxy.requests.append(Request(self.command, self.path.partition("?")[0], span))
            spoil = proxy.spoils.popleft() if proxy.spoils else proxy.always
        if self.command == "GET":
            proxy.gate.wait()
        answer = spoil(self, self._pass_on())
        if answer is not None:
            head = self.command == "HEAD"
            self.begin(answer, None if head else len(answer.body))
            self.wfile.write(b"" if head else answer.body)

    do_HEAD = do_GET

    def _pass_on(self) -> Answer:
        upstream = http.client.HTTPConnection(*self.server.proxy.upstream)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        upstream.request(self.command, self.path, headers=headers)
        answer = upstream.getresponse()
        body = answer.read()
        upstream.close()
        own = ("connection", "date", "server", "transfer-encoding")
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in own}
        return Answer(answer.status, kept, body)

    def begin(self, answer: Answer, nbytes: int | None) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if nbytes is None or name.lower() != "content-length":
                self.send_header(name, value)
        if nbytes is not None:
            self.send_header("Content-Length", str(nbytes))
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


class Store:
    """The server behind the proxy, to put objects into."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        self.address = self.server.get_host_and_port()
        self.client = boto3.client(
            "s3",
            endpoint_url="http://{}:{}".format(*self.address),
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )
        self.client.create_bucket(Bucket=BUCKET)

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content)


@pytest.fixture(scope="module")
def store():
    """One server for the tests of a file."""
    store = Store()
    yield store
    store.server.stop()


@pytest.fixture
def proxy(store, monkeypatch):
    """A proxy of the test's own, with credentials that the server takes."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    proxy = Proxy(store.address)
    yield proxy
    proxy.stop()


@pytest.fixture
def at(proxy, tmp_path):
    """`at(key, **options)`: an object's place, through the proxy, with a cache folder of the test's own."""

    def place(key: str, **options: object) -> S3Path:
        given = {"attempts": 2, "cache": tmp_path / "cache", "block_bytes": 1000, "cache_bytes": 1 << 20}
        return S3Path(BUCKET, key, S3Options(endpoint_url=proxy.url, **{**given, **options}))

    return place
