"""Samples read ahead, by threads or by processes: the same samples, whoever reads them and however far ahead."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.data import Curriculum, MixRecord, NativeLoader, Source
from megatron_davinci.data.batches import Batches
from megatron_davinci.data.slots import RowShape, Slot, memory_file
from megatron_davinci.errors import DataError
from tests.cases import cases
from tests.data.text import VOCABULARY, S, batches_of, same, write


@pytest.fixture
def batches(tmp_path: Path) -> Batches:
    return batches_of(tmp_path)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Batches, and a loader of each kind that stays open from test to test."""
    batches = batches_of(tmp_path_factory.mktemp("kept"))
    with ExitStack() as stack:
        loaders = {
            workers: stack.enter_context(
                NativeLoader(batches, workers=workers, prefetch_steps=3, read_threads=2)
            )
            for workers in (0, 3)
        }
        yield batches, loaders


def poison(loader: NativeLoader, value: int = 0xAB) -> None:
    """Fill all memory that nobody reads into now, so that a row that was not written shows."""
    for slot, user in zip(loader._slots, loader._users, strict=True):
        if user is None:
            slot.tokens.view(np.uint8)[:] = value
            if slot.mask is not None:
                slot.mask[:] = value


class TestParity:
    @pytest.mark.parametrize("workers", [0, 1, 2, 3])
    def test_a_batch_is_what_is_read_at_once_whoever_reads_and_however_far_ahead(self, batches, workers):
        # Sizes with remainders, rows fewer than readers, and a ramp, which the slots grow for.
        steps = np.split(np.arange(120), np.cumsum([1, 2, 7, 7, 7, 30, 5, 30]))
        with NativeLoader(batches, workers=workers, prefetch_steps=3) as loader:
            for ahead in (1, 3):
                for ns in steps[:ahead]:
                    loader.request(ns)
                for k, ns in enumerate(steps):
                    assert same(loader.take(ns), batches.read(ns))
                    poison(loader)
                    if k + ahead < len(steps):
                        loader.request(steps[k + ahead])

    @pytest.mark.parametrize(
        "workers, dtypes",
        [
            (2, ("uint16", "int32")),
            (0, ("int32", "int32")),
            (0, ("int64", "uint8")),
            (0, ("int16", "int64")),
        ],
    )
    def test_dtypes_and_masks(self, tmp_path, workers, dtypes, monkeypatch):
        monkeypatch.setattr("tests.data.text.VOCABULARY", 200 if "uint8" in dtypes else VOCABULARY)
        batches = batches_of(tmp_path, dtypes=dtypes, mask=True)
        with NativeLoader(batches, workers=workers) as loader:
            for ns in (np.arange(40), np.arange(40, 50)):
                poison(loader)
                batch = loader.take(ns)
                assert same(batch, batches.read(ns))
                assert batch.loss_mask is not None and 0 < batch.loss_mask.mean() < 1

    @cases(30)
    @given(data=st.data())
    def test_ranks_restarts_discards_and_batch_sizes_change_nothing(self, kept, data):
        """A run in any layout, begun anew at any step, gives each sample what its number alone gives."""
        batches, loaders = kept
        loader = loaders[data.draw(st.sampled_from(sorted(loaders)))]
        ranks = data.draw(st.integers(1, 4))
        rank = data.draw(st.integers(0, ranks - 1))
        sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
        first = data.draw(st.integers(0, 10**9))
        ends = first + ranks * np.cumsum(sizes)
        steps = [
            np.arange(end - ranks * size, end).reshape(-1, ranks)[:, rank]
            for end, size in zip(ends, sizes, strict=True)
        ]
        loader.discard()
        ahead = 0
        for k, ns in enumerate(steps):
            poison(loader)
            restarts = data.draw(st.booleans())
            if restarts:
                loader.discard()
                ahead = k
            wanted = min(len(steps), k + data.draw(st.integers(0, 3)))
            for following in steps[max(k, ahead) : wanted]:
                loader.request(following)
            ahead = max(k, ahead, wanted)
            assert same(loader.take(ns), batches.read(ns))
            ahead = max(ahead, k + 1)


class Watched(NativeLoader):
    """Keeps what it began to read, in its order."""

    def _begin(self, ns):
        self.begun = [*getattr(self, "begun", []), np.array(ns).tolist()]
        return super()._begin(ns)


class TestRequests:
    @pytest.fixture
    def loader(self, batches):
        with Watched(batches, prefetch_steps=2) as loader:
            yield loader

    def test_several_are_outstanding_and_each_is_read_once(self, loader, batches):
        steps = np.arange(40).reshape(8, 5)
        loader.request(steps[0])
        loader.request(steps[1])
        for k in range(8):
            assert same(loader.take(steps[k]), batches.read(steps[k]))
            if k + 2 < 8:
                loader.request(steps[k + 2])
        assert loader.begun == steps.tolist()

    def test_more_than_was_agreed_are_refused(self, loader):
        loader.request(np.arange(3))
        loader.request(np.arange(3, 6))
        with pytest.raises(ValueError, match="outstanding"):
            loader.request(np.arange(6, 9))

    def test_what_was_not_requested_is_read_at_once_and_ends_all_requests(self, loader, batches):
        loader.request(np.arange(4, 8))
        loader.request(np.arange(8, 12))
        assert same(loader.take(np.arange(12, 16)), batches.read(np.arange(12, 16)))
        # Nothing that was read ahead before is handed out later.
        assert same(loader.take(np.arange(4, 8)), batches.read(np.arange(4, 8)))
        assert loader.begun == [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [4, 5, 6, 7]]

    def test_what_is_discarded_is_not_used(self, loader, batches):
        loader.request(np.arange(4))
        loader.discard()
        assert same(loader.take(np.arange(4)), batches.read(np.arange(4)))
        assert len(loader.begun) == 2

    @pytest.mark.parametrize("first, used", [(15, True), (14, False), (9, False)])
    def test_what_a_later_record_governs_is_read_again(self, loader, batches, first, used):
        steps = np.arange(5, 15).reshape(2, 5)
        for ns in steps:
            loader.request(ns)
        batches.curriculum.append(MixRecord(first, "b", {"code": "1"}))
        for ns in steps:
            batch = loader.take(ns)
            assert same(batch, batches.read(ns))
        assert (len(loader.begun) == 2) is used
        assert (batch.source == batches.curriculum.sources.index("code")).all() == (first == 9)

    def test_a_batch_holds_until_the_next_is_taken(self, loader, batches):
        steps = np.arange(60).reshape(6, 10)
        held = loader.take(steps[0])
        loader.request(steps[1])
        loader.request(steps[2])
        for _ in range(3):
            loader.discard()
            loader.request(steps[3])
            loader.request(steps[4])
        for request in list(loader._queue):
            loader._wait_for(request)
        assert same(held, batches.read(steps[0]))

    def test_the_callers_array_may_change_after_the_request(self, loader, batches):
        ns = np.arange(4)
        loader.request(ns)
        ns += 4
        assert same(loader.take(np.arange(4)), batches.read(np.arange(4)))
        assert len(loader.begun) == 1


class TestErrors:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_damaged_window_is_an_error_of_its_batch_alone(self, tmp_path, workers):
        tokens = np.arange(6 * S + 1)
        tokens[3 * S + 4] = VOCABULARY
        write(tmp_path / "bad", tokens)
        source = Source.open("bad", tmp_path / "bad", S, vocab_size=VOCABULARY)
        batches = Batches(Curriculum({"bad": 6}, 1, [MixRecord(0, "a", {"bad": "1"})]), {"bad": source})
        windows = batches.curriculum.locate_many(np.arange(6)).window.tolist()
        steps = np.arange(6).reshape(3, 2)
        bad = next(k for k in range(3) if 3 in [windows[n] for n in steps[k]])
        with NativeLoader(batches, workers=workers, prefetch_steps=3) as loader:
            for ns in steps:
                loader.request(ns)
            for k, ns in enumerate(steps):
                if k == bad:
                    with pytest.raises(DataError) as caught:
                        loader.take(ns)
                    with pytest.raises(DataError) as expected:
                        batches.read(ns)
                    assert str(caught.value) == str(expected.value)
                    assert f"bytes {2 * (3 * S + 4)} to" in str(caught.value)
                else:
                    assert same(loader.take(ns), batches.read(ns))
            loader.discard()
            assert same(loader.take(steps[bad - 1]), batches.read(steps[bad - 1]))

    def test_a_shard_that_shrinks_is_named(self, batches, tmp_path):
        with NativeLoader(batches) as loader:
            assert same(loader.take(np.arange(9)), batches.read(np.arange(9)))
            for name in ("web", "code"):
                os.truncate(tmp_path / f"{name}.bin", 0)
            poison(loader)
            with pytest.raises(DataError, match=r"shorter than it was|(web|code)\.bin"):
                loader.take(np.arange(9, 30))

    def test_a_thread_that_ends_is_waited_for_by_nobody(self, batches, monkeypatch):
        def fails(slot, job):
            raise MemoryError("no memory for rows")

        monkeypatch.setattr("megatron_davinci.data.workers._rows", fails)
        with NativeLoader(batches, prefetch_steps=2) as loader:
            loader.request(np.arange(9))
            for ns in (np.arange(9), np.arange(9, 12)):
                with pytest.raises(MemoryError, match="no memory for rows"):
                    loader.take(ns)

    def test_no_record_is_an_error_where_the_samples_are_taken(self, batches):
        with NativeLoader(batches) as loader:
            loader.request(np.array([-1]))
            with pytest.raises(DataError, match="No record"):
                loader.take(np.array([-1]))
            loader.request(np.array([0]))
            assert same(loader.take(np.array([0])), batches.read(np.array([0])))


class TestMemory:
    def test_whoever_pins_learns_of_each_slots_memory_and_when_it_goes(self, batches):
        now: dict[int, int] = {}

        def on_slot(memory):
            address = memory.ctypes.data
            assert memory.dtype == np.uint8 and address not in now
            now[address] = memory.nbytes
            return lambda: now.pop(address)

        with NativeLoader(batches, prefetch_steps=1, on_slot=on_slot) as loader:
            assert not now
            for size in (4, 9, 2):
                batch = loader.take(np.arange(size))
                at = batch.tokens.ctypes.data
                assert any(first <= at < first + nbytes for first, nbytes in now.items())
            assert len(now) == 1, "only what is used is made"
        assert not now

    def test_a_slot_is_the_same_memory_for_all_who_have_it_and_grows(self):
        shape = RowShape(S, "uint16", True)
        one = Slot(shape, memory_file())
        other = Slot(shape, os.dup(one.fd))
        for rows in (3, 5000):
            one.grow(rows)
            other.map(rows)
            one.tokens[:] = np.arange(rows)[:, None] % 999
            one.mask[:] = 7
            one.plan[:] = 5
            assert other.tokens[:, 0].tolist() == [row % 999 for row in range(rows)]
            assert other.mask.min() == 7 and other.plan.min() == 5
            other.rows[rows - 1][:] = b"\1" * len(other.rows[rows - 1])
            assert (one.tokens[rows - 1] == 0x0101).all() and one.tokens[rows - 2, 0] == rows - 2 - 999 * (
                (rows - 2) // 999
            )
        old = one.tokens
        one.grow(2)
        assert one.tokens is old, "it never shrinks"
        one.close()
        assert old[5, 0] == 5, "an array keeps its memory"
        other.close()

    def test_closing_twice_ends_the_threads_once(self, batches):
        before = threading.active_count()
        loader = NativeLoader(batches, read_threads=3)
        loader.request(np.arange(4))
        loader.close()
        loader.close()
        assert threading.active_count() == before
        with pytest.raises(RuntimeError, match="closed"):
            loader.request(np.arange(4))
