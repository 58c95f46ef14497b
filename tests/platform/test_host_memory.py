"""Host memory on a CPU: nothing is pinned, nothing is copied on the way to the device."""

import numpy as np

from megatron_davinci.platform.device import choose
from megatron_davinci.platform.host_memory import HostToDevice, pin_host_memory


def test_on_a_cpu_the_device_has_the_array_itself():
    carrier, array = HostToDevice(choose("cpu")), np.arange(6, dtype=np.uint16)
    assert carrier.pin(array.view(np.uint8)) is None
    tensor = carrier.copy(array)
    carrier.wait()
    array[0] = 9
    assert tensor.long().tolist() == [9, 1, 2, 3, 4, 5]


def test_memory_that_cuda_does_not_take_is_said_and_no_error():
    assert pin_host_memory(0, 4096) is False
