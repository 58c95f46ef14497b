"""A slot is whole, or known not to be: whatever was torn, flipped or never written."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.platform.snapshot_memory import RankMemory, digest_of, memory_bytes

SIZES = {"data": 5000, "parity": 1700}


def fill(memory, slot, value):
    memory.invalidate(slot)
    for part in SIZES:
        region = memory.region(slot, part)
        region[:] = np.random.default_rng(value).integers(0, 256, len(region))
        memory.mark(slot, part, {"step": value, "digest": digest_of(region)})


@pytest.fixture(scope="module")
def memory():
    return RankMemory.create(SIZES["data"], SIZES["parity"])


def test_the_same_memory_is_seen_through_another_descriptor(memory):
    fill(memory, 0, 3)
    fill(memory, 1, 4)
    other = RankMemory(os.dup(memory.descriptor))
    assert [other.read(slot, "data")["step"] for slot in (0, 1)] == [3, 4]
    assert all(other.is_whole(slot, part) for slot in (0, 1) for part in SIZES)
    assert (other.data_bytes, other.parity_bytes) == (SIZES["data"], SIZES["parity"])
    other.close()


def test_new_memory_holds_nothing():
    fresh = RankMemory.create(100, 0)
    assert fresh.read(0, "data") is None
    assert not fresh.is_whole(1, "parity")
    assert os.fstat(fresh.descriptor).st_blocks * 512 >= memory_bytes(100, 0)  # all there already


@given(
    slot=st.integers(0, 1),
    part=st.sampled_from(sorted(SIZES)),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_a_flipped_bit_is_found_and_touches_nothing_else(memory, slot, part, place, bit):
    for one in (0, 1):
        fill(memory, one, one)
    region = memory.region(slot, part)
    region[int(place * len(region))] ^= 1 << bit
    whole = {(s, p): memory.is_whole(s, p) for s in (0, 1) for p in SIZES}
    assert [key for key, good in whole.items() if not good] == [(slot, part)]


@given(place=st.integers(0, 120), bit=st.integers(0, 7))
def test_a_flipped_bit_of_a_mark_is_found(memory, place, bit):
    fill(memory, 0, 5)
    begin = memory._mark(0, "data")
    length = 24 + int.from_bytes(memory._bytes[begin : begin + 8].tobytes(), "little")
    memory._bytes[begin + place % length] ^= 1 << bit
    assert memory.read(0, "data") is None


def test_at_every_moment_of_a_write_one_slot_is_whole(memory, monkeypatch):
    fill(memory, 0, 10)
    fill(memory, 1, 20)
    seen = []

    def look(*_):
        seen.append([memory.is_whole(slot, "data") and memory.read(slot, "data")["step"] for slot in (0, 1)])

    memory.invalidate(0)
    look()
    region = memory.region(0, "data")
    for begin in range(0, len(region), 1000):
        region[begin : begin + 1000] = 9
        look()
    memory.mark(0, "data", {"step": 30, "digest": digest_of(region)})
    look()
    assert all(slots == [False, 20] for slots in seen[:-1])
    assert seen[-1] == [30, 20]


@pytest.mark.parametrize("size", [0, 100, 4096, 100_000])
def test_other_memory_is_no_snapshot(size):
    descriptor = os.memfd_create("other")
    os.ftruncate(descriptor, size)
    with pytest.raises(ValueError, match=r"too short|another kind"):
        RankMemory(descriptor)
