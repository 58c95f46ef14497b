"""Every test of an op runs emulated, in plain torch, and on a GPU where there is one."""

import pytest
import torch

from megatron_davinci.kernels import ways

WAYS = [
    pytest.param("emulator", marks=pytest.mark.needs("emulator")),
    "reference",
    pytest.param("auto", marks=pytest.mark.gpu, id="cuda"),
]


@pytest.fixture(params=WAYS)
def device(request):
    """The device that tensors must be on; ops run there by the way that the test's name has."""
    with ways.using(request.param):
        yield torch.device("cuda" if request.param == "auto" else "cpu")
