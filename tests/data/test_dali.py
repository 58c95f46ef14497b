"""DALI gives the samples that were asked for, bitwise, wherever it starts and whoever reads; and ends cleanly."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.data.batches import Batch, Batches
from megatron_davinci.data.curriculum import Curriculum
from megatron_davinci.data.dali import DaliLoader, MicroBatches, _Piece, _Pipeline, end
from megatron_davinci.data.indexed_writer import IndexedDatasetWriter
from megatron_davinci.data.journal import MixRecord
from megatron_davinci.data.source import Source
from megatron_davinci.errors import DataError, EnvironmentProblem
from tests.cases import is_long

S = 8
MIX = MixRecord(0, "a", {"web": "0.7", "code": "0.3"})
LATER = MixRecord(40, "b", {"web": "0.1", "code": "0.9"})
needs_dali = pytest.mark.needs("dali")


def make_batches(
    folder: Path, *, vocab_size: int | None = None, kind: type[Batches] = Batches, masked: bool = False
) -> Batches:
    sources = {}
    for name, tokens in (("code", 1000 + np.arange(5 * S + 1)), ("web", np.arange(20 * S + 1))):
        if not (folder / f"{name}.bin").exists():
            has_mask = masked and name == "web"
            with IndexedDatasetWriter(folder / name, "uint16", mask=has_mask) as writer:
                writer.add_document(tokens, loss=tokens % 3 > 0 if has_mask else None)
        sources[name] = Source.open(name, folder / name, S, vocab_size=vocab_size)
    windows = {name: source.num_windows for name, source in sources.items()}
    return kind(Curriculum(windows, 1, [MIX]), sources)


@pytest.fixture(scope="module")
def batches(tmp_path_factory) -> Batches:
    return make_batches(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Batches:
    return make_batches(tmp_path_factory.mktemp("masked"), masked=True)


def of_rank(first: int, batch: int, rank: int, ranks: int, size: int) -> np.ndarray:
    """This rank's samples of a global batch, micro-batch by micro-batch."""
    return np.arange(first, first + batch).reshape(-1, ranks, size)[:, rank].reshape(-1)


def equal(one: Batch, other: Batch) -> bool:
    return (
        one.tokens.dtype == other.tokens.dtype
        and np.array_equal(one.tokens, other.tokens)
        and one.source.dtype == other.source.dtype
        and np.array_equal(one.source, other.source)
        and (one.loss_mask is None) == (other.loss_mask is None)
        and (one.loss_mask is None or np.array_equal(one.loss_mask, other.loss_mask))
    )


def dali(batches: Batches, *, workers: int = 0, size: int = 1, ranks: int = 1) -> DaliLoader:
    return DaliLoader(batches, micro_batch_size=size, data_ranks=ranks, workers=workers, prefetch_steps=2)


class Witness(Batches):
    """Samples that say who read them: their source is 1 in a process that imported torch or Megatron-Core."""

    def read(self, ns: np.ndarray) -> Batch:
        heavy = bool({"torch", "megatron.core"} & set(sys.modules))
        tokens = np.full((len(ns), S + 1), os.getpid() % 60000, self.dtype)
        return Batch(tokens, np.full(len(ns), heavy, np.int32))


@needs_dali
class TestParity:
    @settings(max_examples=20 if is_long() else 3)
    @given(data=st.data())
    def test_with_reading_them_directly_for_every_rank_size_and_ramp(self, batches, data):
        ranks, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        rank, at = data.draw(st.integers(0, ranks - 1)), data.draw(st.integers(0, 2**40))
        loader = dali(batches, size=size, ranks=ranks)
        for micro_batches in data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)):
            ns = of_rank(at, micro_batches * ranks * size, rank, ranks, size)
            loader.request(ns)
            assert equal(loader.take(ns), batches.read(ns))
            at += micro_batches * ranks * size
        loader.close()

    @pytest.mark.parametrize(("ranks", "size"), [(2, 2), pytest.param(3, 1, marks=pytest.mark.long)])
    def test_in_processes_over_a_ramp_and_a_jump(self, batches, masked, ranks, size):
        batches, rank = masked if ranks == 2 else batches, ranks - 1
        loader = dali(batches, workers=ranks - 1, size=size, ranks=ranks)
        steps = [(0, 1), (1, 2), (3, 2), (5, 4), (1_000_003, 2)]  # (micro-batch of the run, micro-batches)
        for at, micro_batches in steps:
            ns = of_rank(at * ranks * size, micro_batches * ranks * size, rank, ranks, size)
            assert equal(loader.take(ns), batches.read(ns))
        loader.close()

    def test_of_samples_with_a_loss_mask(self, masked):
        taken = dali(masked, size=3).take(np.arange(30))
        assert taken.loss_mask is not None and 0 < taken.loss_mask.mean() < 1
        assert equal(taken, masked.read(np.arange(30)))

    def test_of_nothing_is_nothing(self, batches):
        taken = dali(batches, size=2).take(np.array([], np.int64))
        assert taken.tokens.shape == (0, S + 1) and taken.source.shape == (0,)


@needs_dali
class TestOrder:
    @pytest.mark.long
    def test_what_was_read_ahead_is_not_used_once_a_later_record_governs_it(self, tmp_path):
        batches = make_batches(tmp_path)
        loader = dali(batches, workers=1)
        assert equal(loader.take(np.arange(30, 38)), batches.read(np.arange(30, 38)))
        before = batches.read(np.arange(38, 60))
        batches.curriculum.append(LATER)
        for ns in (np.array([38, 39, 40, 41]), np.arange(42, 60)):
            assert equal(loader.take(ns), batches.read(ns))
        assert not equal(before, batches.read(np.arange(38, 60)))
        loader.close()

    @pytest.mark.long
    def test_after_a_discard_it_begins_where_it_is_asked_to(self, batches):
        loader = dali(batches)
        loader.request(np.arange(4))
        loader.discard()
        assert equal(loader.take(np.arange(9, 12)), batches.read(np.arange(9, 12)))

    @pytest.mark.long
    def test_samples_are_believed_by_their_numbers_alone(self, batches, monkeypatch):
        loader, give = dali(batches), _Pipeline.next
        wrong = [True, False]

        def shifted(pipeline: _Pipeline) -> _Piece:
            piece = give(pipeline)
            return piece._replace(identity=piece.identity + 1) if wrong.pop(0) else piece

        monkeypatch.setattr(_Pipeline, "next", shifted)
        assert equal(loader.take(np.array([3])), batches.read(np.array([3])))
        wrong[:] = [True, True]
        with pytest.raises(EnvironmentProblem, match="other samples than it was asked for") as raised:
            loader.take(np.array([4]))
        assert (raised.value.found, raised.value.expected) == ("samples [5]", "samples [4]")

    @pytest.mark.long
    def test_a_gap_within_a_micro_batch_loses_and_moves_nothing(self, batches):
        loader = dali(batches, size=2)
        for ns in (np.arange(4), np.array([4, 5, 6, 9]), np.arange(10, 14), np.array([3, 1])):
            assert equal(loader.take(ns), batches.read(ns))

    def test_micro_batches_are_whole(self, batches):
        with pytest.raises(ValueError, match="reshape"):
            dali(batches, size=2).take(np.arange(3))


@pytest.mark.parametrize("killed", [False, True], ids=["ends", "is killed"])
def test_a_process_that_somebody_else_waits_for_too_is_known_to_have_ended(monkeypatch, killed):
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60 if killed else 0,))
    process.start()
    popen, waitpid = process._popen, os.waitpid

    def told_first(pid: int, flags: int) -> tuple[int, int]:
        """As the second of two threads that wait: the first has been told, and notes it a moment later."""
        found, status = waitpid(pid, flags)
        if found:
            Timer(0.05, setattr, (popen, "returncode", os.waitstatus_to_exitcode(status))).start()
            raise ChildProcessError
        return found, status

    monkeypatch.setattr(os, "waitpid", told_first)
    end(process, 0 if killed else 60)
    assert not process.is_alive() and process not in multiprocessing.active_children()
    assert process.exitcode == (-signal.SIGKILL if killed else 0)


@needs_dali
class TestProcesses:
    def test_import_neither_torch_nor_megatron_and_are_not_this_one(self, tmp_path):
        loader = dali(make_batches(tmp_path, kind=Witness), workers=1)
        taken = loader.take(np.arange(2))
        [process] = multiprocessing.active_children()
        assert taken.tokens[0, 0] == process.pid % 60000 and taken.source.tolist() == [0, 0]
        loader.close()
        assert multiprocessing.active_children() == []

    @pytest.mark.long
    def test_an_error_in_one_is_the_error_that_reading_directly_raises(self, tmp_path):
        batches = make_batches(tmp_path, vocab_size=1010)
        ns = np.arange(40)
        with pytest.raises(DataError) as direct:
            batches.read(ns)
        loader = dali(batches, workers=1, size=40)
        with pytest.raises(DataError) as carried:
            loader.take(ns)
        assert carried.value.render() == direct.value.render()
        loader.close()

    def test_one_that_is_killed_is_said_and_the_others_end(self, batches):
        loader = dali(batches, workers=2)
        loader.take(np.arange(2))
        killed = multiprocessing.active_children()[0]
        os.kill(killed.pid, signal.SIGKILL)
        with pytest.raises(EnvironmentProblem, match="ended while it was reading") as raised:
            loader.take(np.arange(2, 1000))
        assert raised.value.found == f"process {killed.pid}, ended by SIGKILL"
        assert multiprocessing.active_children() == []

    def test_end_when_their_parent_is_killed(self, tmp_path):
        make_batches(tmp_path)
        holder = textwrap.dedent(f"""
            import multiprocessing, pathlib, time
            import numpy as np
            from tests.data.test_dali import dali, make_batches
            loader = dali(make_batches(pathlib.Path({str(tmp_path)!r})), workers=1)
            loader.take(np.arange(2))
            print(*(p.pid for p in multiprocessing.active_children()), flush=True)
            time.sleep(600)
        """)
        with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True) as parent:
            pids = [int(pid) for pid in parent.stdout.readline().split()]
            parent.kill()
        assert len(pids) == 1
        deadline = time.monotonic() + 30
        while is_running(pids[0]):
            assert time.monotonic() < deadline, "the process outlives its parent"
            time.sleep(0.02)

    def test_what_they_are_sent_is_small(self, batches):
        assert len(pickle.dumps(MicroBatches(batches, 0, 1, 1))) < 4096

    def test_are_refused_where_they_cannot_be_started(self, batches, monkeypatch):
        monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
        with pytest.raises(EnvironmentProblem, match="cannot be started from here"):
            dali(batches, workers=1)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_without_dali_the_extra_is_named(batches, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(EnvironmentProblem, match="dali needs NVIDIA DALI") as raised:
        dali(batches)
    assert "megatron-davinci[dali]" in raised.value.do


def test_micro_batches_of_all_ranks_are_the_run(batches):
    ranks, size = 3, 2
    sources = [MicroBatches(batches, rank * size, size, ranks * size) for rank in range(ranks)]
    assert [n for k in range(4) for source in sources for n in source.samples(k)] == list(range(24))
