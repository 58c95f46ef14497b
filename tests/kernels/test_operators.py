"""An operator called as it is and one that torch sees to do the same."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_davinci.kernels import rms_norm as norms
from megatron_davinci.kernels import swiglu
from megatron_davinci.kernels.cross_entropy_passes import gradient_


def test_autograd_sees_that_what_it_kept_was_overwritten():
    leaf = torch.randn(2, 8, requires_grad=True)
    logits = leaf * 1
    kept = logits.exp()  # keeps its result
    gradient_(kept.detach(), torch.zeros(2, dtype=torch.int64), torch.zeros(2), 0, 8, -100)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_a_dispatch_mode_sees_the_call():
    seen = []

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x = torch.randn(2, 8)
    plain = swiglu.forward(x)
    with Listening():
        listened = swiglu.forward(x)
    assert "davinci.swiglu_forward.default" in seen
    assert torch.equal(plain, listened)


def test_a_fake_tensor_is_computed_by_its_shape():
    with FakeTensorMode():
        x, weight = torch.empty(3, 16), torch.empty(16)
    normal, _, scale = norms.forward(x, None, weight, 1e-6)
    assert type(normal).__name__ == "FakeTensor"
    assert (normal.shape, scale.shape) == ((3, 16), (3,))
