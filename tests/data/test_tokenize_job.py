"""The job: the same bytes whoever does it, whatever kills it, and nothing under another plan."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_davinci.data import encode_part, finished, tokenize, tokenize_worker
from megatron_davinci.data.document_ends import check_first_document
from megatron_davinci.data.indexed import IndexedDataset
from megatron_davinci.data.jsonl import Fields
from megatron_davinci.data.mask import mask_blocks
from megatron_davinci.data.source import Source
from megatron_davinci.data.tokenize import Options, Tokenized
from megatron_davinci.data.tokenize_job import Job, opened
from megatron_davinci.data.tokenizer import EOD, Tokenizer
from megatron_davinci.data.verify import verify_source
from megatron_davinci.errors import ConfigError, DataError, EnvironmentProblem
from tests.data.tokenizing import documents, load_telling, telling_tokenizer, write_jsonl

TEXTS = [f"document {n}: " + "it's abba, \u6570\u636e e\u0301! " * (n * 7 % 40) + EOD for n in range(1200)]
PIECE = 30_000
SHARD = 20_000
QA = Fields("text", "prompt", "response")

# What the tests kill: a job of many small pieces and shards.
SCRIPT = f"""
import sys
from pathlib import Path
from megatron_davinci.data import tokenize, encode_part
tokenize.PIECE_BYTES, encode_part.BATCH_DOCUMENTS = {PIECE}, 16
folder, workers = Path(sys.argv[1]), int(sys.argv[2])
shuffle, pack = (number or None for number in map(int, sys.argv[3:5]))
fields = tokenize.Fields("text", "prompt", "response")
options = tokenize.Options(fields, {SHARD}, shuffle=shuffle, pack=pack)
tokenizer = tokenize.Tokenizer.load(folder)
tokenize.tokenize([folder / "*.jsonl"], tokenizer, folder / sys.argv[5], "web", "general", options, workers=workers)
"""


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


EVENTS = 40


def events(work: Path) -> int:
    """Parts and shards that a job has finished."""
    return sum(
        len(list(work.glob(f"{kind}/*.json"))) for kind in ("parts", "shards") if (work / kind).is_dir()
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = telling_tokenizer(tmp_path / "job")
    records: list[Any] = [{"text": text} for text in TEXTS]
    records[5::50] = [{"prompt": f"what is {n}?", "response": "abba " * n} for n in range(1, 25)]
    write_jsonl(folder / "a.jsonl", records[:900])
    write_jsonl(folder / "b.jsonl", records[900:])
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and batches as small as the script's."""
    monkeypatch.setattr(tokenize, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(encode_part, "BATCH_DOCUMENTS", 16)
    monkeypatch.setattr(tokenize, "nasty_texts", lambda tokenizer: [])  # tried in test_fast_bpe.py


def run(folder: Path, out: str, **given: Any) -> Tokenized:
    """The script's job, or one that differs in what is given, in this process."""
    fields = given.pop("fields", QA)
    kept = {name: given.pop(name) for name in ("shuffle", "pack", "shard_tokens", "dtype") if name in given}
    options = Options(fields, **{"shard_tokens": SHARD} | kept)
    inputs = given.pop("inputs", [folder / "*.jsonl"])
    tokenizer = given.pop("tokenizer", None) or Tokenizer.load(folder)
    return tokenize.tokenize(
        inputs, tokenizer, folder / out, "web", "general", options, **{"workers": 1} | given
    )


@pytest.mark.parametrize(
    ("shuffle", "pack", "kills"),
    [
        (None, None, 2),
        pytest.param(None, None, 30, marks=pytest.mark.long),
        pytest.param(7, None, 10, marks=pytest.mark.long),
        pytest.param(7, 64, 10, marks=pytest.mark.long),
    ],
)
@pytest.mark.usefixtures("small")
def test_a_killed_job_goes_on_and_its_bytes_are_those_of_an_undisturbed_one(
    folder: Path, tmp_path: Path, shuffle: int | None, pack: int | None, kills: int
) -> None:
    chance = random.Random(kills)
    run(folder, "whole", shuffle=shuffle, pack=pack)
    expected = content(folder / "whole")
    work = folder / ".killed.tokenizing"
    killed = 0
    while killed < kills:
        # When so many parts and shards are done, and some milliseconds later; before that, somewhere in the start.
        moment = chance.randrange(EVENTS)
        early = events(work) >= moment
        workers = chance.choice((1, 2, 3))
        arguments = map(str, (folder, workers, shuffle or 0, pack or 0, "killed"))
        job = subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments])
        while job.poll() is None and events(work) < moment:
            time.sleep(0.001)
        time.sleep(chance.random() * (1.5 if early else 0.03))
        job.kill()
        killed += job.wait() == -signal.SIGKILL
        if (folder / "killed").exists() and not work.exists():
            # It got to its end between two kills: once more from the beginning.
            assert content(folder / "killed") == expected
            shutil.rmtree(folder / "killed")
    if work.exists() or not (folder / "killed").exists():
        run(folder, "killed", shuffle=shuffle, pack=pack)
    assert content(folder / "killed") == expected
    assert not work.exists()


@pytest.mark.usefixtures("small")
def test_the_bytes_do_not_hang_on_the_workers(folder: Path) -> None:
    run(folder, "one", workers=1)
    arguments = map(str, (folder, 3, 0, 0, "three"))
    subprocess.run([sys.executable, "-c", SCRIPT, *arguments], check=True)
    assert content(folder / "one") == content(folder / "three")


class Stop(Exception):
    """Ends a job in this process."""


def stopped(folder: Path, out: str, after: int, **given: Any) -> Path:
    """A job that ended when so many parts were begun; its folder."""
    begun = 0

    def progress(done: int, total: int) -> None:
        nonlocal begun
        begun += 1
        if begun > after:
            raise Stop

    with pytest.raises(Stop):
        run(folder, out, progress=progress, **given)
    return folder / f".{out}.tokenizing"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("change", ["cut", "gone"])
def test_an_input_that_changes_while_it_is_read_makes_no_source(tmp_path: Path, change: str) -> None:
    telling_tokenizer(tmp_path)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {n}"} for n in range(50)])

    def progress(done: int, total: int) -> None:
        if change == "cut":
            path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"\n") + 1])
        else:
            path.unlink(missing_ok=True)

    with pytest.raises(DataError, match=r"was changed while|cannot be read") as caught:
        run(tmp_path, "out", inputs=[path], fields=Fields("text"), workers=1, progress=progress)
    assert str(path) in caught.value.render()
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small")
def test_finished_pieces_are_not_read_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = stopped(folder, "again", 30)
    done = {int(path.stem) for path in (work / "parts").glob("*.json")}
    assert len(done) > 2 and list((work / "shards").glob("*.json"))
    encode, read = encode_part.PartEncoder.encode, []

    def watched(self: Any, piece: Any, number: int, *rest: Any) -> Any:
        read.append(number)
        return encode(self, piece, number, *rest)

    monkeypatch.setattr(encode_part.PartEncoder, "encode", watched)
    totals = set()
    run(folder, "again", progress=lambda done, total: totals.add(total))
    assert read and not done & set(read)
    (total,) = totals
    assert total < sum(path.stat().st_size for path in folder.glob("*.jsonl"))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "ending", ["ids", *(pytest.param(e, marks=pytest.mark.long) for e in ("ends", "json"))]
)
def test_a_torn_part_is_made_again(folder: Path, ending: str) -> None:
    run(folder, "whole")
    work = stopped(folder, "torn", 8)
    part = max((work / "parts").glob("*.json")).with_suffix(f".{ending}")
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    (work / "out" / "shard-00099.bin.tmp-1-abc").write_bytes(b"torn")
    run(folder, "torn")
    assert content(folder / "torn") == content(folder / "whole")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "ending", ["bin", *(pytest.param(e, marks=pytest.mark.long) for e in ("idx", "mask"))]
)
def test_a_torn_shard_never_gets_the_sources_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    run(folder, "whole", shuffle=3)
    done = Job._shard_done

    def stop_at_the_second(job: Any, answer: Any) -> None:
        done(job, answer)
        if len(job.shards) == 2:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Job, "_shard_done", stop_at_the_second)
        with pytest.raises(Stop):
            run(folder, "torn", shuffle=3)
    os.truncate(folder / ".torn.tokenizing" / "out" / f"shard-00001.{ending}", 40)
    run(folder, "torn", shuffle=3)
    assert content(folder / "torn") == content(folder / "whole")
    work = stopped(folder, "late", 30)
    os.truncate(work / "out" / f"shard-00000.{ending}", 40)
    with pytest.raises(DataError, match="lacks tokens"):
        run(folder, "late")
    assert not (folder / "late").exists()


@pytest.mark.long
@pytest.mark.usefixtures("small")
def test_a_job_whose_folder_was_meddled_with_is_not_gone_on_with(folder: Path) -> None:
    work = stopped(folder, "out", 30)
    (work / "shards" / "00000.json").write_bytes(b'{"prefix"')
    with pytest.raises(DataError, match="lacks tokens"):
        run(folder, "out")
    assert run(folder, "out", restart=True).manifest.documents


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "gone",
    [
        *(pytest.param(one, marks=pytest.mark.long) for one in ("", "plan.json", "parts", "lock")),
        "parts/0000000.json",
    ],
)
def test_a_job_killed_after_its_last_rename_is_finished(
    folder: Path, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(folder, "late")
    with pytest.raises(DataError, match="taken"):
        run(folder, "late")
    shutil.rmtree(folder / "late")
    with monkeypatch.context() as patch:
        patch.setattr(finished, "remove", lambda folder: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            run(folder, "late")
    before, work = content(folder / "late"), folder / ".late.tokenizing"
    if gone:
        shutil.rmtree(work / gone) if (work / gone).is_dir() else (work / gone).unlink()
    for other in ({"pack": 8}, {"shuffle": 1}):
        with pytest.raises(DataError, match="taken"):
            run(folder, "late", **other)
    assert run(folder, "late") == whole
    assert content(folder / "late") == before
    assert not work.exists()


@pytest.mark.long
@pytest.mark.usefixtures("small")
def test_a_job_goes_on_only_under_the_plan_that_it_began_with(tmp_path: Path) -> None:
    folder = telling_tokenizer(tmp_path / "here")
    records: list[Any] = [{"text": text} for text in TEXTS[:299]] + [{"prompt": "a?", "response": "b"}]
    first, second = (write_jsonl(folder / f"{name}.jsonl", records) for name in "ab")
    work = stopped(folder, "out", 10)
    other = load_telling(tmp_path / "other", normalizer=None)

    def refused(**given: Any) -> str:
        with pytest.raises(DataError, match="begun otherwise") as caught:
            run(folder, "out", **given)
        assert caught.value.where == work
        return str(caught.value.found)

    assert "shard_tokens was 20000, is 9" in refused(shard_tokens=9)
    assert "shuffle was None, is 3" in refused(shuffle=3)
    assert "fields was" in refused(fields=Fields("text"))
    assert "tokenizer_sha256 was" in refused(tokenizer=other)
    assert f"{second} is no longer among the inputs" in refused(inputs=[first])
    assert "the inputs are in another order" in refused(inputs=[second, first])
    status = second.stat()
    os.utime(second, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert f"{second} was written again since" in refused()
    second.write_text(second.read_text() + "\n")
    assert f"{second} had {status.st_size:,} bytes, has {status.st_size + 1:,}" in refused()
    made = run(folder, "out", restart=True)
    assert made.manifest.documents == 600
    assert not work.exists()


@pytest.mark.usefixtures("small")
def test_a_damaged_plan_is_named_and_can_be_begun_anew(folder: Path) -> None:
    work = stopped(folder, "plan", 8)
    (work / "plan.json").write_text('{"inputs": []}')
    with pytest.raises(DataError, match="cannot be read") as caught:
        run(folder, "plan")
    assert caught.value.where == work / "plan.json"
    run(folder, "plan", restart=True)


@pytest.mark.usefixtures("small")
def test_two_jobs_do_not_make_one_source(folder: Path) -> None:
    with opened(folder / ".both.tokenizing", restart=False), pytest.raises(DataError, match="Another job"):
        run(folder, "both")


@pytest.mark.usefixtures("small")
def test_a_worker_that_dies_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = tokenize_worker.Processes.submit

    def kill(self: tokenize_worker.Processes, task: Any) -> None:
        submit(self, task)
        for worker in self._workers:
            worker.kill()

    monkeypatch.setattr(tokenize_worker.Processes, "submit", kill)
    with pytest.raises(EnvironmentProblem, match="worker of a tokenising job has died") as caught:
        run(folder, "dead", workers=2)
    assert "-9" in str(caught.value.found)
    assert not (folder / ".dead.tokenizing").exists()


def test_options_that_cannot_be(folder: Path) -> None:
    with pytest.raises(ConfigError, match="at least one token"):
        run(folder, "no", shard_tokens=0)
    for pack in (1, 2_000_000_000):
        with pytest.raises(ConfigError, match="two tokens"):
            run(folder, "no", pack=pack)
    for workers in (0, -3):
        with pytest.raises(ConfigError, match="needs a worker"):
            run(folder, "no", workers=workers)
    with pytest.raises(ConfigError, match="Questions have answers"):
        run(folder, "no", fields=Fields("text", "prompt"))
    for dtype in ("int8", "float32", "uint32", "words"):
        with pytest.raises(ConfigError, match="in this dtype"):
            run(folder, "no", dtype=dtype)
    assert not (folder / ".no.tokenizing").exists()


@pytest.mark.usefixtures("small")
def test_a_prompt_carries_no_loss_and_its_answer_and_plain_text_do(folder: Path) -> None:
    manifest = run(folder, "qa").manifest
    tokenizer = Tokenizer.load(folder)
    assert manifest.has_mask
    loss = np.concatenate(
        [np.concatenate(list(mask_blocks(folder / "qa" / s.prefix, s.tokens))) for s in manifest.shards]
    )
    expected_ids, expected_loss = [], []
    for record in map(
        json.loads, "".join(p.read_text() for p in sorted(folder.glob("*.jsonl"))).splitlines()
    ):
        # Each by itself: "...?" and "abba" share no token.
        prompt, answer = record.get("prompt", ""), record.get("response", record.get("text"))
        one, two = (ids.tolist() for ids in tokenizer.encode_batch([prompt, answer]))
        expected_ids.append([*one, *two, tokenizer.eod_id])
        expected_loss += [0] * len(one) + [1] * (len(two) + 1)
    assert documents(folder / "qa", manifest) == expected_ids
    assert loss.tolist() == expected_loss
    assert 0 < expected_loss.count(0) < len(expected_loss)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("begun", [False, True], ids=["at once", "gone on with"])
def test_named_fields_that_no_record_has_end_the_job(folder: Path, begun: bool) -> None:
    wrong = Fields("text", "question", "answer")
    write_jsonl(folder / "a.jsonl", [{"text": text} for text in TEXTS[:300]])
    inputs = [folder / "a.jsonl"]
    if begun:
        stopped(folder, "out", 2, fields=wrong, inputs=inputs)
    with pytest.raises(DataError, match="No record is a question") as caught:
        run(folder, "out", fields=wrong, inputs=inputs)
    assert "'question' and 'answer'" in caught.value.found
    assert not (folder / "out").exists()
    assert run(folder, "out", inputs=[*inputs, folder / "b.jsonl"]).manifest.has_mask  # nothing is in the way


@pytest.mark.usefixtures("small")
def test_a_shuffled_source_has_the_same_documents_in_an_order_that_hangs_on_the_seed(folder: Path) -> None:
    plain = run(folder, "plain").manifest
    shuffled = [run(folder, f"s{seed}", shuffle=seed).manifest for seed in (1, 2)]
    orders = [documents(folder / f"s{seed}", m) for seed, m in zip((1, 2), shuffled)]
    there = documents(folder / "plain", plain)
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(there)
    assert orders[0] != orders[1] != there != orders[0]
    # Neighbours are parted: hardly a document is followed by the one that followed it.
    following = {tuple(one): two for one, two in pairwise(there)}
    assert sum(following.get(tuple(one)) == two for one, two in pairwise(orders[0])) < 20
    assert all(0.5 * SHARD < shard.tokens < 2 * SHARD for shard in shuffled[0].shards)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shuffle", [None, pytest.param(3, marks=pytest.mark.long)])
def test_packed_sequences_hold_whole_documents_and_fillings_that_carry_no_loss(
    folder: Path, shuffle: int | None
) -> None:
    length, tokenizer = 512, Tokenizer.load(folder)
    given = {"inputs": [write_jsonl(folder / "t.jsonl", [{"text": t} for t in TEXTS])], "shuffle": shuffle}
    given |= {"fields": Fields("text")}
    plain = documents(folder / "p", run(folder, "p", **given).manifest)
    manifest = run(folder, "packed", pack=length, **given).manifest
    pieces = []
    for shard in manifest.shards:
        assert (shard.tokens - 1) % length == 0  # every sequence is a window
        loss = np.concatenate(list(mask_blocks(folder / "packed" / shard.prefix, shard.tokens)))
        tokens = IndexedDataset(folder / "packed" / shard.prefix)
        at = 0
        for n in range(len(tokens)):
            one = tokens[n].tolist()
            assert at // length == (at + len(one) - 1) // length  # none lies in two sequences
            if set(one) == {tokenizer.eod_id} and not loss[at : at + len(one)].any():
                at += len(one)
                continue
            # A sequence's first token would be predicted from the sequence before.
            assert loss[at : at + len(one)].tolist() == [int(bool(at % length)), *[1] * (len(one) - 1)]
            pieces.append(one)
            at += len(one)
    cut = [one[i : i + length] for one in plain for i in range(0, len(one), length)]
    # An end that begins a sequence by itself looks like a filling.
    alone = [tokenizer.eod_id]
    assert sorted(one for one in pieces if one != alone) == sorted(one for one in cut if one != alone)
    assert manifest.tokens < 1.1 * sum(map(len, cut))


@pytest.mark.usefixtures("small")
def test_what_packing_has_cut_needs_no_end_and_all_else_does(folder: Path) -> None:
    texts = ["a cut one " * 60, "b", "c whole " * 9, "d"]
    path = write_jsonl(folder / "t.jsonl", [{"text": text} for text in texts])
    out = folder / "packed"
    manifest = run(folder, "packed", pack=64, inputs=[path], fields=Fields("text")).manifest
    assert manifest.packed == 64
    first = IndexedDataset(out / manifest.shards[0].prefix)[0]
    assert len(first) == 64 and first[-1] != manifest.eod_id
    assert verify_source(out, deep=True).problems == [[] for _ in manifest.shards]
    check_first_document(Source.open("packed", out, 64), manifest.eod_id, "document_mask")
    # The same tokens, of which nobody says that they were packed.
    manifest.model_copy(update={"packed": None}).save(out)
    assert "packed" not in json.loads((out / "manifest.json").read_text())
    assert "does not end" in str(verify_source(out, deep=True).problems)
    with pytest.raises(DataError, match="do not end with the token"):
        check_first_document(Source.open("packed", out, 64), manifest.eod_id, "document_mask")
