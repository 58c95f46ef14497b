"""A copy on the host is of the values at that moment, in memory that is kept for the next one."""

import torch

from megatron_davinci.platform import host_copy
from megatron_davinci.platform.host_copy import HostCopy


def test_what_changes_afterwards_does_not_change_the_copy():
    tensors = [torch.arange(6.0).reshape(2, 3), torch.arange(4, dtype=torch.bfloat16)]
    first = HostCopy().take(tensors)
    expected = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.add_(1)
    assert all(torch.equal(copy, one) for copy, one in zip(first, expected, strict=True))


def test_the_memory_is_used_again_where_sizes_are_the_same():
    host = HostCopy()
    before = [copy.data_ptr() for copy in host.take([torch.zeros(100), torch.zeros(7, 3)])]
    after = host.take([torch.ones(100), torch.ones(5, 3), torch.ones(2)])
    assert after[0].data_ptr() == before[0]
    assert all(torch.equal(copy, torch.ones_like(copy)) for copy in after)
    assert [tuple(copy.shape) for copy in after] == [(100,), (5, 3), (2,)]


def test_a_part_of_a_larger_tensor_takes_no_more_than_its_own_size():
    whole = torch.arange(100.0).reshape(10, 10)
    [copy] = HostCopy().take([whole[:, 2:4]])
    assert torch.equal(copy, whole[:, 2:4])
    assert copy.untyped_storage().nbytes() == 20 * 4


def test_nothing_is_copied_where_there_is_no_room(monkeypatch):
    host = HostCopy()
    assert host.take([torch.zeros(1000)]) is not None
    monkeypatch.setattr(host_copy, "available_bytes", lambda: 5000)
    assert host.take([torch.zeros(1000), torch.zeros(1000)]) is not None  # 4,000 bytes are there already
    assert host.take([torch.zeros(9000)]) is None
    monkeypatch.undo()
    assert host.take([torch.zeros(9000)]) is not None


def test_what_is_available_is_known_here():
    available = host_copy.available_bytes()
    assert available is None or available > 0
