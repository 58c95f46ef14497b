"""Pages over HTTP into WARC files: manners towards a server on loopback, what is left out and why, and going on."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_davinci.cli.main import main
from megatron_davinci.darwin import fetch as fetching
from megatron_davinci.darwin.fetch import JOURNAL, fetch, read_lists
from megatron_davinci.darwin.manners import Manners, Refused, check_redirect, root_of, seconds_to_wait
from megatron_davinci.errors import DataError, EnvironmentProblem
from tests.darwin.making import made, recipe

AGENT = "test-crawl (nobody@example.org)"
ROBOTS = (
    "User-agent: test-crawl\nDisallow: /private/\nAllow: /private/open$\nCrawl-delay: 0.02\n\n"
    "User-agent: *\nDisallow: /\n"
)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        server, path = self.server, self.path
        server.seen.append((path, time.monotonic(), self.headers["User-Agent"]))
        if path == "/robots.txt":
            return self.answer(server.robots.encode() if server.robots is not None else b"", "text/plain",
                               server.robots_status)  # fmt: skip
        if path == "/slow":
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", "100000")
            self.end_headers()
            for _ in range(100):
                try:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
                except OSError:
                    return None
        if path == "/cut":
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b"<p>part")
            self.close_connection = True
            return None
        if path == "/busy" and server.tried["/busy"] < 1:
            server.tried["/busy"] += 1
            return self.answer(b"", "text/plain", 503, ("Retry-After", "0.05"))
        if path == "/forever":
            return self.answer(b"", "text/plain", 429, ("Retry-After", "3600"))
        if path.startswith("/moved"):
            return self.answer(b"", "text/plain", 302, ("Location", server.targets[path]))
        if path == "/picture":
            return self.answer(b"\x89PNG", "image/png")
        if path == "/large":
            return self.answer(b"y" * 30_000, "text/plain")
        if path == "/packed":
            body = gzip.compress(b"<p>A packed page.</p>")
            return self.answer(body, "text/html", 200, ("Content-Encoding", "gzip"))
        if path == "/missing":
            return self.answer(b"", "text/html", 404)
        return self.answer(
            f"<main><p>The page {path}, déjà vu.</p></main>".encode(), "text/html; charset=utf-8"
        )

    def answer(self, body, media, status=200, *headers):
        self.send_response(status)
        for name, value in [("Content-Type", media), ("Content-Length", str(len(body))), *headers]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(robots=ROBOTS, status=200):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.seen, server.tried, server.robots, server.robots_status = [], Counter(), robots, status
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.targets = {"/moved": "/good?1", "/moved-away": "http://127.9.9.9/secret", "/moved-private": "/private/x",
                      "/moved-again": "/moved-again"}  # fmt: skip
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def manners(**changes):
    return Manners(AGENT)._replace(
        **{"delay": 0.0, "seconds": 1.5, "retries": 1, "max_bytes": 20_000} | changes
    )


def test_every_address_ends_as_a_page_or_with_a_reason_and_a_recipe_reads_them(tmp_path):
    paths = {
        "/good?1": "stored", "/good?2": "stored", "/packed": "stored", "/private/open": "stored", "/busy": "stored",
        "/moved": "stored", "/private/x": "robots", "/moved-private": "robots", "/moved-away": "redirect",
        "/moved-again": "redirect", "/missing": "http_404", "/picture": "other_media", "/large": "too_large",
        "/slow": "timeout", "/cut": "no_connection", "/forever": "http_429",
    }  # fmt: skip
    with serving() as server:
        urls = [server.url + path for path in paths] + ["ftp://x.org/a", "no address", "http://127.0.0.1:1/"]
        counts = fetch(urls, tmp_path / "crawl", manners())
        entries = [json.loads(line) for line in (tmp_path / "crawl" / JOURNAL).read_text().splitlines()]
        found = {entry["url"]: entry.get("reason", "stored") for entry in entries}
        assert found == {server.url + path: what for path, what in paths.items()} | {
            "ftp://x.org/a": "not_a_url", "no address": "not_a_url", "http://127.0.0.1:1/": "robots_unreachable",
        }  # fmt: skip
        assert sum(counts.values()) == len(urls) and counts["stored"] == 6
        assert {agent for _, _, agent in server.seen} == {AGENT}
        assert "/private/x" not in [path for path, _, _ in server.seen]
        asked = len(server.seen)
        assert fetch(urls, tmp_path / "crawl", manners()) == counts and len(server.seen) == asked
        source = {"name": "web", "paths": ["crawl/*.warc.gz"]}
        corpus = made(recipe(tmp_path, sources=[source], steps=["extract_html"]))
        assert corpus.counts["output"] == corpus.counts["input"] == 6
        texts = [record["text"].strip() for record in corpus.records()]
        assert sorted(texts)[0] == "A packed page." and "The page /private/open, déjà vu." in texts
        moved = [record["fields"]["url"] for record in corpus.records()]
        assert moved.count(server.url + "/good?1") == 2


def test_a_host_is_asked_one_page_at_a_time_and_not_faster_than_it_wishes(tmp_path):
    robots = "User-agent: *\nCrawl-delay: 0.1\n"
    with serving(robots) as server:
        fetch([f"{server.url}/{k}" for k in range(4)], tmp_path, manners())
        times = [moment for _, moment, _ in server.seen]
        assert len(times) == 5 and min(b - a for a, b in itertools.pairwise(times)) >= 0.1
    with serving("User-agent: *\nCrawl-delay: 900\n") as server:
        counts = fetch([f"{server.url}/{k}" for k in range(3)], tmp_path / "slow", manners())
        assert counts == {"crawl_delay": 3} and len(server.seen) == 1


@pytest.mark.parametrize("status, expected", [(404, "stored"), (403, "stored"), (500, "robots_unreachable")])
def test_what_a_missing_robots_file_means(tmp_path, status, expected):
    with serving("User-agent: *\nDisallow: /\n", status) as server:
        assert fetch([server.url + "/a"], tmp_path, manners()) == {expected: 1}


def test_a_killed_crawl_goes_on_and_holds_each_page_once(tmp_path, monkeypatch):
    with serving("") as server:
        urls = [f"{server.url}/{k}" for k in range(6)]
        note = fetching.Store._note

        def stop(store, entry):
            if len(store.done) == 3:
                raise KeyboardInterrupt  # the page is stored, and not noted
            note(store, entry)

        monkeypatch.setattr(fetching.Store, "_note", stop)
        with pytest.raises(BaseException):  # noqa: B017
            fetch(urls, tmp_path / "crawl", manners())
        monkeypatch.undo()
        with (tmp_path / "crawl" / JOURNAL).open("ab") as journal:
            journal.write(b'{"url": "cut')
        assert fetch(urls, tmp_path / "crawl", manners()) == {"stored": 6}
        assert sorted(path.name for path in (tmp_path / "crawl").glob("*.gz")) == [
            "crawl-00000.warc.gz",
            "crawl-00001.warc.gz",
        ]
    corpus = made(
        recipe(tmp_path, sources=[{"name": "web", "paths": ["crawl/*.gz"], "format": "warc"}], steps=[])
    )
    assert sorted(record["fields"]["url"] for record in corpus.records()) == urls


def test_a_full_disk_is_said_and_gone_on_from(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with serving("") as server:
        urls = [f"{server.url}/{k}" for k in range(3)]
        with monkeypatch.context() as patch:
            patch.setattr(fetching.os, "fsync", full)
            with pytest.raises(EnvironmentProblem, match="The disk is full: writing a page"):
                fetch(urls, tmp_path / "crawl", manners())
        assert fetch(urls, tmp_path / "crawl", manners()) == {"stored": 3}


def test_a_folder_has_one_crawl_at_a_time_and_a_journal_that_can_be_read(tmp_path):
    store = fetching.Store(tmp_path, AGENT)
    store.put("http://a.org/", "http://a.org/", "200 OK", [], b"<p>A page.")
    # It would take back what the first one has stored and not noted yet.
    with pytest.raises(EnvironmentProblem, match="Another crawl is at work"):
        fetch(["not an address"], tmp_path, manners())
    store.close()
    assert fetch(["not an address"], tmp_path, manners()) == {"not_a_url": 1}
    with (tmp_path / JOURNAL).open("ab") as journal:
        journal.write(bytes(7) + b"\n")
    with pytest.raises(DataError, match="line 3"):
        fetch(["not an address"], tmp_path, manners())


def test_addresses_and_answers_that_servers_give():
    assert root_of("https://Example.org:8080/a?b#c") == "https://example.org:8080"
    for wrong in ("http://", "http://user:word@x.org/", "javascript:x", "http://x:port/", "/a"):
        with pytest.raises(Refused, match="not_a_url"):
            root_of(wrong)
    check_redirect("http://a.org/", "https://b.org/")
    check_redirect("http://10.0.0.1/", "http://10.0.0.1/x")
    for target in (
        "http://169.254.169.254/latest",
        "http://localhost/",
        "http://localhost./",
        "http://127.1/",
        "http://2130706433/",
        "http://[::1]/",
        "http://db.internal/",
    ):
        with pytest.raises(Refused, match="private network"):
            check_redirect("http://a.org/", target)
    assert seconds_to_wait("7") == 7 and seconds_to_wait(None) == seconds_to_wait("soon") == 0
    assert seconds_to_wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_the_command(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("# a list\nnot an address\n\nnot an address\n")
    command = [
        "data",
        "fetch",
        str(tmp_path / "list.txt"),
        "--out",
        str(tmp_path / "crawl"),
        "--agent",
        AGENT,
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "not_a_url" in shown and "1 lines name an address" in shown
    assert main([*command, "--hosts", "0"]) == 2 and "--hosts" in capsys.readouterr().err
    assert main([*command, "--seconds", "nan"]) == 2 and "--seconds" in capsys.readouterr().err
    assert main([*command[:-1], "é"]) == 2 and "printable ASCII" in capsys.readouterr().err
    (tmp_path / "file").write_text("of somebody")
    assert main([*command[:4], str(tmp_path / "file"), "--agent", AGENT]) != 0
    assert "A file system error: making a folder" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(DataError, match="empty"):
        read_lists([tmp_path / "empty.txt"])
