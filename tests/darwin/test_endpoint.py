"""A model's server with every bad manner: named, asked again where that helps, not for ever; no key in sight."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import time

import pytest
from pydantic import ValidationError

from megatron_davinci.darwin import endpoint as module
from megatron_davinci.darwin.answers import Answer, Answers, question_key
from megatron_davinci.darwin.endpoint import Client, Endpoint, Trouble
from megatron_davinci.errors import ConfigError, DataError, EnvironmentProblem
from tests.darwin.model_server import _Handler, serving

MESSAGES = [{"role": "user", "content": "<passage>\nwords\n</passage>"}]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.01)


def asked(server, times=1, form=None, **settings):
    """The answers, or what each got instead, and the counts."""

    async def ask():
        client = Client(Endpoint(**server.endpoint(**settings)))
        try:
            found = await asyncio.gather(
                *(client.ask(MESSAGES, form=form) for _ in range(times)), return_exceptions=True
            )
        finally:
            await client.close()
        return found, dict(client.counts)

    server.forget()
    return asyncio.run(ask())


@pytest.mark.parametrize(
    "fault,kind",
    [("429", "rate_limited"), ("500", "server_error"), ("503", "server_error"), ("cut", "connection"),
     ("garbled", "not_json"), ("shape", "wrong_shape"), ("slow", "timeout")],
)  # fmt: skip
def test_what_may_pass_is_asked_again(server, fault, kind):
    faults = itertools.chain([fault], itertools.repeat(""))
    server.fault = lambda: next(faults)
    patience = 0.2 if fault == "slow" else 5.0
    [answer], counts = asked(server, timeout=patience)
    assert answer == Answer("<passage>words</passage>", "stop", 6, 7)
    assert counts == {kind: 1, "answered": 1}
    server.fault = lambda: fault
    [trouble], counts = asked(server, timeout=patience, requests=2)
    assert isinstance(trouble, Trouble) and trouble.kind == kind and counts == {kind: 2}


@pytest.mark.parametrize(
    "fault,kind",
    [("stream_cut", "cut_stream"), ("stream_short", "cut_stream"), ("stream_garbled", "not_json"),
     ("stream_shape", "wrong_shape"), ("stream_unfinished", "wrong_shape"), ("stream_error", "server_error"),
     ("cut", None), ("429", "rate_limited")],
)  # fmt: skip
def test_an_answer_in_pieces_counts_when_it_is_done(server, fault, kind):
    faults = itertools.chain([fault], itertools.repeat(""))
    server.fault = lambda: next(faults)
    [answer], counts = asked(server, timeout=5.0, stream=True)
    assert answer == Answer("<passage>words</passage>", "stop", 6, 7)
    assert counts == ({kind: 1} if kind else {}) | {"answered": 1}
    assert server.requests[-1]["stream_options"] == {"include_usage": True}


def test_a_server_is_told_the_form_in_its_own_words(server):
    server.fault = lambda: ""
    for structured, expected in (
        (None, {}),
        ("vllm", {"structured_outputs": {"regex": "YES|NO"}}),
        ("sglang", {"regex": "YES|NO"}),
    ):
        asked(server, form="YES|NO", structured=structured)
        [body] = server.requests
        assert {name: body[name] for name in ("structured_outputs", "regex") if name in body} == expected
    plain, held = (Endpoint(**server.endpoint(structured=each)) for each in (None, "vllm"))
    assert plain.decides != held.decides and "structured" not in plain.decides


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_only_thought_has_answered(server, monkeypatch, stream):
    """Servers that part thoughts from answers give no content where the limit came first; again is no better."""
    server.fault = lambda: ""
    monkeypatch.setattr(server, "model", lambda content: "" if stream else None)
    monkeypatch.setattr(server, "finish", "length")
    [answer], counts = asked(server, stream=stream, timeout=5.0)
    assert answer == Answer("", "length", 6, 7) and counts == {"answered": 1}


def test_the_longest_pause_that_a_server_wishes_for_counts():
    async def both():
        client, waits = Client(Endpoint(url="http://127.0.0.1:9/v1", model="tiny")), iter([600.0, 0.0])

        async def refused(body):
            await asyncio.sleep(0)  # so that both are on their way
            raise Trouble("rate_limited", "", next(waits))

        client._post = refused
        await asyncio.gather(*(client._once(MESSAGES, 0, None) for _ in range(2)), return_exceptions=True)
        await client.close()
        return client._not_before - time.monotonic()

    assert asyncio.run(both()) > 300


@pytest.mark.parametrize("fault,kind", [("400", "refused"), ("413", "refused"), ("endless", "too_large")])
def test_what_will_not_pass_is_not_asked_again(server, fault, kind):
    server.fault = lambda: fault
    [trouble], counts = asked(server, response_bytes=100_000)
    assert trouble.kind == kind and counts == {kind: 1} and len(server.requests) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_limit_of_an_answer_has_the_name_that_the_server_takes(server, monkeypatch, stream):
    refusal = b"Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    answer = _Handler.answer

    def newer(self, server, body, fault):
        return self.reply(400, refusal) if "max_tokens" in body else answer(self, server, body, fault)

    server.fault = lambda: ""
    monkeypatch.setattr(_Handler, "answer", newer)
    found, counts = asked(server, 3, max_tokens=50, concurrency=1, stream=stream, timeout=5.0)
    assert {one.text for one in found} == {"<passage>words</passage>"} and counts == {"answered": 3}
    names = ("max_tokens", "max_completion_tokens")
    assert [[body.get(name) for name in names] for body in server.requests] == [[50, None], *[[None, 50]] * 3]
    # A server that takes neither is asked twice, and says why.
    monkeypatch.setattr(_Handler, "answer", lambda self, server, body, fault: self.reply(400, refusal))
    [trouble], counts = asked(server, timeout=5.0)
    assert (trouble.kind, counts, len(server.requests)) == ("refused", {"refused": 1}, 2)


def test_a_run_ends_where_nothing_can_come_of_it(server, monkeypatch):
    server.fault = lambda: "404"
    assert "does not know the model" in str(asked(server)[0][0])
    server.fault = lambda: "400"
    assert any("has not answered one question" in str(found) for found in asked(server, times=25)[0])
    with serving() as gone:
        endpoint = gone.endpoint(requests=2)
    [problem], _ = asked(
        type("Gone", (), {"endpoint": lambda *_, **__: endpoint, "forget": lambda _: None})()
    )
    assert isinstance(problem, EnvironmentProblem) and "answers so far are kept" in str(problem)


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(server, monkeypatch):
    with pytest.raises(ConfigError, match="export DAVINCI_TEST_KEY"):
        asked(server, key_variable="DAVINCI_TEST_KEY")
    monkeypatch.setenv("DAVINCI_TEST_KEY", "sk-very-secret\n")
    server.fault, server.keys = lambda: "", set()
    asked(server, key_variable="DAVINCI_TEST_KEY")
    assert server.keys == {"Bearer sk-very-secret"}
    for fault in ("401", "400", "500"):
        server.fault = lambda fault=fault: fault
        [found], _ = asked(server, key_variable="DAVINCI_TEST_KEY", requests=1)
        assert "secret" not in str(found) and "[key]" in str(found)
    for url in ("http://me:pass@host/v1", "http://host/v1?key=3", "ftp://host", "host/v1"):
        with pytest.raises(ValidationError, match="should"):
            Endpoint(url=url, model="m")


def test_no_more_at_a_time_and_no_faster_than_agreed(server, monkeypatch):
    server.fault, server.delay = lambda: "", 0.02
    found, _ = asked(server, times=12, concurrency=3)
    assert server.most_at_once <= 3 and len(found) == 12
    server.delay = 0.0
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    asked(server, times=4, requests_per_minute=60)
    assert [round(seconds) for seconds in slept] == [1, 2, 3]

    async def spend():
        bucket = module.Bucket(
            600.0, 2, burst=None
        )  # five a second for each of two; ten seconds may be saved up
        bucket.spend(60.0)
        await bucket.take(0.0)

    asyncio.run(spend())
    assert slept[-1] == pytest.approx(2.0, abs=0.1)


def test_answers_are_for_no_more_eyes_than_they_were(tmp_path):
    path = tmp_path / "answers"
    for before, after in ((0o644, 0o640), (0o600, 0o600), (0o660, 0o660)):
        path.touch()
        path.chmod(before)
        Answers(path).close()
        assert path.stat().st_mode & 0o777 == after


def test_answers_are_written_once_and_read_back(tmp_path):
    path = tmp_path / "made" / "answers.sqlite"
    first, second = Answers(path), Answers(path)
    key = question_key({"messages": MESSAGES, "attempt": 0})
    assert first.get(key) is None and key != question_key({"messages": MESSAGES, "attempt": 1})
    assert first.put(key, Answer("one\ud800", "stop", 3, 4)) == Answer("one?", "stop", 3, 4)
    assert second.put(key, Answer("two", "stop", 3, 4)).text == "one?", "the first counts"
    assert Answers(path, read_only=True).get(key).text == "one?"
    first.close()
    second.close()
    (tmp_path / "other").write_bytes(b"no database at all, but long enough to be looked at" * 20)
    with pytest.raises(DataError, match="not a file of answers"):
        Answers(tmp_path / "other")
    with sqlite3.connect(tmp_path / "later") as base:
        base.execute("PRAGMA user_version=7")
    with pytest.raises(DataError, match="another version"):
        Answers(tmp_path / "later")
    with pytest.raises(EnvironmentProblem, match="cannot be kept"):
        Answers(tmp_path / "nowhere", read_only=True)
