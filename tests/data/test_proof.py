"""A job that begins before its encoder is proven: nothing of what an untrusted one has made is kept."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_davinci.data import growing_shard, tokenize
from megatron_davinci.data.fast_bpe import FastEncoder, first_difference
from megatron_davinci.data.job_plan import Plan
from megatron_davinci.data.proof import NotTheReference, Proof, unproven
from megatron_davinci.data.tokenize import Options, Tokenized
from megatron_davinci.data.tokenizer import LateTokenizer, Tokenizer
from megatron_davinci.errors import DataError, EnvironmentProblem
from tests.data.tokenizing import telling_tokenizer, write_jsonl


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = telling_tokenizer(tmp_path / "job")
    write_jsonl(folder / "a.jsonl", [{"text": f"abba {n} " * (n % 50)} for n in range(1, 1500)])
    monkeypatch.setattr(tokenize, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(tokenize, "nasty_texts", lambda tokenizer: ["e\u0301"])
    return folder


def run(folder: Path, out: str, **given: Any) -> Tokenized:
    options = Options(shard_tokens=given.pop("shard_tokens", 30_000))
    tokenizer = Tokenizer.load(folder)
    given = {"workers": 2, "say": lambda line: None} | given
    return tokenize.tokenize([folder / "a.jsonl"], tokenizer, folder / out, "web", "d", options, **given)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def late(answer: Any, moment: threading.Event) -> Any:
    """A comparison that ends when it is told to."""

    def compare(*given: Any) -> Any:
        assert moment.wait(60)
        return answer

    return compare


def watching(work: Path, moment: threading.Event, seen: set[bool]) -> Callable[[int, int], None]:
    """Ends the comparison when some parts are done, and notes whether they were proven by then."""

    def progress(done: int, total: int) -> None:
        if len(list((work / "parts").glob("*.json"))) > 3 and not moment.is_set():
            seen.add(unproven(work))
            moment.set()

    return progress


@pytest.mark.long
def test_work_begun_before_the_proof_is_kept_if_it_holds_and_done_again_if_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(folder, "whole", workers=1)
    work = folder / ".out.tokenizing"
    for difference, encoder in ((None, "gigatoken"), ("an id differs.", "tokenizers")):
        moment, seen, said = threading.Event(), set[bool](), list[str]()
        monkeypatch.setattr(tokenize, "_difference", late(difference, moment))
        made = run(folder, "out", progress=watching(work, moment, seen), say=said.append)
        assert made.encoder.startswith(encoder) and seen == {True}
        assert made.manifest == whole.manifest
        assert content(folder / "out") == content(folder / "whole")
        assert said == (
            []
            if difference is None
            else [f"{difference} Encoding by tokenizers, which is many times slower."]
        )
        assert not work.exists()
        subprocess.run(["rm", "-r", str(folder / "out")], check=True)


def test_who_asked_for_the_fast_one_by_name_gets_nothing_of_a_wrong_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "_difference", lambda *given: "an id differs.")
    with pytest.raises(DataError, match="reference's ids"):
        run(folder, "out", backend="gigatoken")
    assert not (folder / "out").exists() and not (folder / ".out.tokenizing").exists()


SCRIPT = """
import sys, time
from pathlib import Path
from megatron_davinci.data import tokenize
tokenize.PIECE_BYTES = 20_000
tokenize._difference = lambda *given: time.sleep(600)
folder = Path(sys.argv[1])
tokenizer = tokenize.Tokenizer.load(folder)
options = tokenize.Options(shard_tokens=30_000)
tokenize.tokenize([folder / "a.jsonl"], tokenizer, folder / "out", "web", "d", options, workers=2)
"""


def test_what_a_killed_job_has_left_unproven_is_begun_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, "whole", workers=1)
    work = folder / ".out.tokenizing"
    job = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)])
    while len(list(work.glob("shards/*.json"))) < 2 and job.poll() is None:
        time.sleep(0.005)
    job.kill()
    job.wait()
    assert unproven(work) and Plan.load(work).encoder.startswith("gigatoken")
    for path in work.glob("parts/*.ends"):
        path.write_bytes(b"wrong")  # would be seen if it were looked at
    totals = set()
    run(folder, "out", progress=lambda done, total: totals.add(total))
    assert totals == {(folder / "a.jsonl").stat().st_size}
    assert content(folder / "out") == content(folder / "whole")


def test_a_comparison_that_fails_says_so(tmp_path: Path) -> None:
    def fails() -> str | None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Proof(tmp_path, fails).look(wait=True)
    with pytest.raises(NotTheReference, match="differs"):
        Proof(tmp_path, lambda: "differs").look(wait=True)
    assert unproven(tmp_path)
    Proof(tmp_path, lambda: None).look(wait=True)
    assert not unproven(tmp_path)


@pytest.mark.long
def test_a_shard_that_grows_is_there_when_its_last_document_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown: list[int] = []
    start = growing_shard.GrowingShard.__init__

    def watched(self: Any, number: int, *given: Any) -> None:
        grown.append(number)
        start(self, number, *given)

    monkeypatch.setattr(growing_shard.GrowingShard, "__init__", watched)
    shards = len(run(folder, "whole", workers=1).manifest.shards)
    assert shards > 3 and not grown
    run(folder, "many")
    assert grown and grown == sorted(set(grown)) and grown[-1] < shards
    assert content(folder / "many") == content(folder / "whole")
    grown.clear()
    run(folder, "alone", workers=1, shard_tokens=10**9)
    run(folder, "one", shard_tokens=10**9)
    assert grown == [0]
    assert content(folder / "one") == content(folder / "alone")


def test_a_disk_that_fails_under_a_growing_shard_ends_the_job_and_leaves_nothing_half_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any) -> None:
        raise EnvironmentProblem("The disk is full: writing tokens failed.")

    with monkeypatch.context() as patch:
        patch.setattr("megatron_davinci.data.indexed_writer.IndexedDatasetWriter.write_early", full)
        with pytest.raises(EnvironmentProblem, match="disk is full"):
            run(folder, "out")
    work = folder / ".out.tokenizing"
    assert not list((work / "out").iterdir()) and not unproven(work)
    run(folder, "whole", workers=1)
    run(folder, "out")
    assert content(folder / "out") == content(folder / "whole")


def test_a_worker_loads_the_reference_only_for_texts_that_need_it(folder: Path) -> None:
    whole = Tokenizer.load(folder)
    late = LateTokenizer(folder / "tokenizer.json", whole.vocab_size, whole.eod_token)
    fast = FastEncoder(late, asked=True)
    assert first_difference(fast, whole, ["plain", "caf\u00e9"]) is None
    assert "_loaded" not in vars(late)
    assert first_difference(fast, whole, ["plain", "\u0897"]) is None
    assert "_loaded" in vars(late)
    np.testing.assert_array_equal(late.encode_batch(["abba"])[0], whole.encode_batch(["abba"])[0])
    with pytest.raises(DataError, match="cannot be read"):
        LateTokenizer(folder / "no.json", 1, "x")


def test_what_the_room_exports_comes_from_where_it_says() -> None:
    import megatron_davinci.data as room

    assert sorted(room._MODULE_OF) == sorted(room.__all__)
    assert all(
        getattr(room, name).__module__.startswith("megatron_davinci.data.")
        for name in room.__all__
        if name != "Loader"
    )
    assert set(room.__all__) <= set(dir(room))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        room.nothing  # noqa: B018
