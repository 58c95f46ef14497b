"""Slots on CUDA: pinned while they live, copied without a wait, whole when they arrive."""

import numpy as np
import pytest
import torch

from megatron_davinci.data.slots import RowShape, Slot, memory_file
from megatron_davinci.platform.device import choose
from megatron_davinci.platform.host_memory import HostToDevice, pin_host_memory

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_a_slot_is_pinned_and_arrives_whole(dtype):
    carrier = HostToDevice(choose("cuda"))
    for fd in (None, memory_file()):
        slot = Slot(RowShape(4096, dtype, False), fd, carrier.pin)
        for rows in (3, 64):
            slot.grow(rows)
            assert torch.from_numpy(slot.tokens).is_pinned()
            for value in range(50):
                carrier.wait()
                slot.tokens[:] = (np.arange(rows)[:, None] + value * 100) % 60_000
                found = carrier.copy(slot.tokens[:rows])
                assert found.is_cuda and found.element_size() == slot.tokens.itemsize
            assert torch.equal(found.long().cpu(), torch.from_numpy(slot.tokens.astype(np.int64)))
        slot.close()


def test_a_refusal_is_said_and_nothing_else_fails_for_it():
    assert pin_host_memory(0, 4096) is False
    assert torch.arange(5, device="cuda").sum().item() == 10
