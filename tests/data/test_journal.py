"""The mixture journal keeps what was decided, and finds out when it was touched."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_davinci.data.journal import Journal, MixRecord, SkipRecord
from megatron_davinci.errors import DataError, EnvironmentProblem

WARM = MixRecord(0, "1.1", {"web": "0.7", "code": "0.3"})
MATH = MixRecord(1000, "1.2", {"web": "0.5", "code": "0.2", "maths": "0.3"})
SPIKE = SkipRecord(1500, 1600, "loss spike at step 15")
LATE = MixRecord(2000, "2.1", {"maths": "1"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "journal.jsonl"
    journal = Journal.open(path)
    for record in (WARM, MATH, SPIKE):
        assert journal.append(record) is True
    return path


class TestKeeping:
    def test_what_is_appended_is_read_back(self, path):
        journal = Journal.open(path)
        assert journal.records == (WARM, MATH, SPIKE)
        assert journal.mixes == (WARM, MATH)
        assert journal.skips == (SPIKE,)

    def test_one_line_a_record_numbered(self, path):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["index"] for line in lines] == [0, 1, 2]
        assert [line["kind"] for line in lines] == ["mix", "mix", "skip"]
        assert lines[1]["weights"] == {"web": "0.5", "code": "0.2", "maths": "0.3"}

    def test_opening_creates_nothing(self, tmp_path):
        assert Journal.open(tmp_path / "journal.jsonl").records == ()
        assert list(tmp_path.iterdir()) == []

    def test_a_record_is_on_disk_when_append_returns(self, tmp_path, monkeypatch):
        synced = []
        fsync = os.fsync
        monkeypatch.setattr(
            os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
        )
        journal = Journal.open(tmp_path / "journal.jsonl")
        journal.append(WARM)
        assert synced == [str(tmp_path / "journal.jsonl"), str(tmp_path)]
        journal.append(MATH)
        assert synced[2:] == [str(tmp_path / "journal.jsonl")]

    def test_in_memory_it_behaves_the_same(self, path):
        journal = Journal.in_memory()
        for record in (WARM, MATH, SPIKE):
            journal.append(record)
        assert journal.digest() == Journal.open(path).digest()
        with pytest.raises(DataError, match="rewrite the past"):
            journal.append(MixRecord(500, "x", {"web": "1"}))


class TestThePast:
    def test_saying_again_what_was_said_changes_nothing(self, path):
        content = path.read_bytes()
        journal = Journal.open(path)
        for record in (WARM, MATH, SPIKE, MixRecord(0, "1.1", {"code": "0.3", "web": "0.7"})):
            assert journal.append(record) is False
        assert path.read_bytes() == content
        assert journal.append(LATE) is True

    @pytest.mark.parametrize(
        "record",
        [
            MixRecord(1000, "1.2", {"web": "1"}),
            MixRecord(1000, "renamed", dict(MATH.weights)),
            MixRecord(999, "1.2", dict(MATH.weights)),
            MixRecord(0, "1.1", {"web": "0.70", "code": "0.30"}),
        ],
    )
    def test_saying_something_else_about_it_is_refused(self, path, record):
        journal = Journal.open(path)
        with pytest.raises(DataError, match="rewrite the past"):
            journal.append(record)
        assert Journal.open(path).records == journal.records == (WARM, MATH, SPIKE)

    def test_a_journal_begins_at_sample_0(self):
        with pytest.raises(DataError, match="begins at sample 0"):
            Journal.in_memory().append(MATH)

    def test_digests_name_each_beginning(self, path):
        journal = Journal.open(path)
        digests = [journal.digest(count) for count in range(4)]
        assert len(set(digests)) == 4 and digests[3] == journal.digest()
        journal.append(LATE)
        assert [journal.digest(count) for count in range(4)] == digests
        assert all(journal.extends(count, digest) for count, digest in enumerate(digests))

    def test_another_journal_does_not_extend_a_checkpoint(self, path):
        other = Journal.in_memory()
        other.append(MixRecord(0, "1.1", {"web": "0.71", "code": "0.29"}))
        digest = Journal.open(path).digest(1)
        assert not other.extends(1, digest)
        assert not other.extends(2, digest) and not other.extends(-1, digest)
        with pytest.raises(DataError, match="too few records"):
            other.digest(2)


class TestDamage:
    @pytest.mark.parametrize(
        "old, new, line",
        [
            (b'"0.7"', b'"0.6"', 1),
            (b'"web": "0.5", "code": "0.2"', b'"web": "0.2", "code": "0.5"', 2),
            (b'"index": 1', b'"index": 2', 2),
            (b'"first_sample": 1000', b'"first_sample": 1001', 2),
            (b"loss spike", b"no reason ", 3),
            (b'"kind": "skip"', b'"kind": "skid"', 3),
            (b"}", b" ", 1),
            (b"{", b"\x00", 1),
            (b"{", b"[" * 10_000, 1),
        ],
    )
    def test_an_edited_line_is_named(self, path, old, new, line):
        content = path.read_bytes()
        assert content != content.replace(old, new, 1)
        path.write_bytes(content.replace(old, new, 1))
        with pytest.raises(DataError, match=f"line {line}\n"):
            Journal.open(path)

    def test_a_removed_repeated_or_moved_line_is_found(self, path):
        a, b, c = path.read_bytes().splitlines(keepends=True)
        for content, line in (
            ([b, c], 1),
            ([a, c], 2),
            ([a, a, b, c], 2),
            ([a, c, b], 2),
            ([a, b"\n", b], 2),
        ):
            path.write_bytes(b"".join(content))
            with pytest.raises(DataError, match=f"line {line}\n"):
                Journal.open(path)

    def test_a_last_line_cut_at_any_byte_is_left_out_and_cut_off_by_the_next_append(self, path):
        whole = path.read_bytes()
        begins = whole.rindex(b"\n", 0, -1) + 1
        for cut in range(begins, len(whole) - 1):
            path.write_bytes(whole[:cut])
            journal = Journal.open(path)
            assert journal.records == (WARM, MATH)
            assert path.read_bytes() == whole[:cut], "reading changes nothing"
            assert journal.append(SPIKE)
            assert path.read_bytes() == whole

    def test_a_last_line_that_lacks_only_its_end_is_kept(self, path):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        journal = Journal.open(path)
        assert journal.records == (WARM, MATH, SPIKE)
        journal.append(LATE)
        assert path.read_bytes().startswith(whole)
        assert Journal.open(path).records == (WARM, MATH, SPIKE, LATE)

    def test_a_last_line_that_was_edited_is_not_taken_for_a_crash(self, path):
        path.write_bytes(path.read_bytes()[:-1].replace(b"1600", b"1700"))
        with pytest.raises(DataError, match="line 3\n"):
            Journal.open(path)

    def test_a_failed_append_leaves_the_journal_as_it_was(self, path, monkeypatch):
        whole, journal = path.read_bytes(), Journal.open(path)

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(EnvironmentProblem, match="disk is full"):
                journal.append(LATE)
        assert path.read_bytes() == whole
        assert journal.records == (WARM, MATH, SPIKE)
        assert journal.append(LATE)
        assert Journal.open(path).records == (WARM, MATH, SPIKE, LATE)

    def test_a_disk_that_takes_half_of_a_line_leaves_nothing_of_it(self, path):
        """In a process of its own: a limit on the size of files stands for the disk, and cuts a write short."""
        program = f"""
import resource
from megatron_davinci.data.journal import Journal, MixRecord
from megatron_davinci.errors import EnvironmentProblem
journal, late = Journal.open({str(path)!r}), MixRecord(2000, "2.1", {{"maths": "1"}})
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, ({path.stat().st_size + 90}, most))
try:
    journal.append(late)
except EnvironmentProblem:
    print(open({str(path)!r}, "rb").read().endswith(b"}}\\n"), len(journal.records))
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
print(journal.append(late))
"""
        whole = path.read_bytes()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.stdout.split() == ["True", "3", "True"], done.stderr
        assert path.read_bytes().startswith(whole)
        assert Journal.open(path).records == (WARM, MATH, SPIKE, LATE)

    def test_two_runs_in_one_folder_do_not_overwrite_each_other(self, path):
        one, two = Journal.open(path), Journal.open(path)
        one.append(LATE)
        with pytest.raises(DataError, match="Something else wrote"):
            two.append(LATE)
        assert Journal.open(path).records == (WARM, MATH, SPIKE, LATE)


class TestRecords:
    @pytest.mark.parametrize(
        "weights, says",
        [
            ({"web": "0.7", "code": "0.2"}, "a sum of 0.9"),
            ({"web": "0.7", "code": "0.300001"}, "a sum of 1.000001"),
            ({"web": "1.5", "code": "-0.5"}, "negative"),
            ({"web": "most"}, "not a number"),
            ({"web": 1.0}, 'as in "0.25"'),
            ({}, "weights"),
        ],
    )
    def test_weights_are_shares_that_sum_to_one(self, weights, says):
        with pytest.raises(DataError, match=says):
            MixRecord(0, "1.1", weights)

    def test_thirds_in_decimals_are_near_enough(self):
        MixRecord(0, "1.1", {"a": "0.3333333333", "b": "0.3333333333", "c": "0.3333333333"})

    @pytest.mark.parametrize("first", [-1, 1.0, True, None])
    def test_samples_are_counted_from_0(self, first):
        with pytest.raises(DataError, match="first_sample"):
            MixRecord(first, "1.1", {"web": "1"})

    def test_weights_name_known_sources(self, path):
        says = r"(?s)^A mixture names sources that the run does not have.*1,000.*journal\.jsonl.*maths.*code, web"
        with pytest.raises(DataError, match=says):
            Journal.open(path, ["web", "code"])
        assert len(Journal.open(path, ["web", "code", "maths"]).records) == 3

    def test_a_skip_is_a_range_that_no_other_skip_overlaps(self):
        for bad in ((5, 5), (6, 5), (-1, 5)):
            with pytest.raises(DataError):
                SkipRecord(*bad, "because")
        journal = Journal.in_memory()
        journal.append(WARM)
        journal.append(SkipRecord(10, 20, "a"))
        journal.append(SkipRecord(20, 25, "b"))
        journal.append(SkipRecord(2, 4, "found later"))
        for bad in ((19, 21), (0, 100), (12, 13), (10, 21)):
            with pytest.raises(DataError, match="overlaps"):
                journal.append(SkipRecord(*bad, "c"))
        assert [journal.after_skips(n) for n in (1, 2, 3, 4, 10, 19, 24, 25)] == [1, 4, 4, 4, 25, 25, 25, 25]

    def test_stretches_without_a_sample_are_those_of_the_skips_in_whatever_order_they_come(self):
        for seed in range(30):
            rng = random.Random(seed)
            bounds = sorted(rng.sample(range(1, 60), 16))
            skips = [SkipRecord(a, b, "x") for a, b in pairwise(bounds) if rng.random() < 0.6]
            journal, gone = Journal.in_memory(), set[int]()
            rng.shuffle(skips)
            for skip in skips:
                journal.append(skip)
                gone.update(range(skip.from_sample, skip.to_sample))
            left = [n for n in range(70) if n not in gone]
            assert journal.usable(0, len(left)).tolist() == left
            for n in range(60):
                assert journal.after_skips(n) == next(m for m in left if m >= n)
                assert journal.skipped_before(n) == len([m for m in gone if m < n])

    def test_a_record_is_added_without_a_walk_over_those_before(self, monkeypatch):
        def compared(one, other):
            comparisons.append(one)
            return one is other

        comparisons: list[object] = []
        for kind in (MixRecord, SkipRecord):
            monkeypatch.setattr(kind, "__eq__", compared)
        for name in ("records", "mixes", "skips"):
            monkeypatch.delattr(Journal, name)
        journal = Journal.in_memory()
        for n in range(200):
            journal.append(MixRecord(100 * n, "1", {"web": "1"}))
            journal.append(SkipRecord(100 * n + 7, 100 * n + 9, "a spike"))
        assert len(comparisons) <= 3 * 200
