"""The layer is built of what was chosen; flash-attn and apex are called as their documentation says."""

from __future__ import annotations

import sys
import types

from tests.ranks import run_ranks


def fake_flash_attn():
    """flash-attn's two functions, computed by torch: [batch, positions, heads, channels], and packed."""
    import torch
    from torch.nn import functional as F

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, deterministic=False):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        assert causal
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=True
        ).transpose(1, 2)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, deterministic=False,
    ):  # fmt: skip
        bounds = zip(
            cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], cu_seqlens_k.tolist(), cu_seqlens_k.tolist()[1:]
        )
        return torch.cat(
            [
                flash_attn_func(
                    q[a:b][None], k[c:d][None], v[c:d][None], softmax_scale=softmax_scale, causal=causal
                )[0]
                for a, b, c, d in bounds
            ]
        )

    module = types.ModuleType("flash_attn")
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    sys.modules["flash_attn"] = module


def fake_apex():
    import torch

    module = types.ModuleType("apex.normalization.fused_layer_norm")
    module.fused_rms_norm_affine = lambda x, weight, shape, eps: torch.nn.functional.rms_norm(
        x, shape, weight, eps
    )
    for name in ("apex", "apex.normalization"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["apex.normalization.fused_layer_norm"] = module


def differences():
    """How far flash-attn's attention is from ours, whole and over documents, and apex's norm from ours."""
    import numpy as np
    import torch
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_davinci.model.attention import SDPAttention
    from megatron_davinci.model.context_parallel import SequencePart
    from megatron_davinci.model.documents import Documents
    from megatron_davinci.model.flash_attention import FlashAttention
    from megatron_davinci.model.norm import ApexRMSNorm, RMSNorm
    from tests.model.test_layers import a_config

    fake_flash_attn()
    fake_apex()
    ours, theirs = (
        kind(a_config(), 1, AttnMaskType.causal, "self") for kind in (SDPAttention, FlashAttention)
    )
    q, k, v = torch.randn(10, 2, 6, 8), torch.randn(10, 2, 2, 8), torch.randn(10, 2, 2, 8)
    ends = np.zeros((2, 10), bool)
    ends[0, 3] = ends[1, 6] = True
    found = []
    for documents in (None, Documents.of(ends, SequencePart(10), torch.device("cpu"))):
        a, b = (one(q, k, v, None, packed_seq_params=documents) for one in (ours, theirs))
        found.append(float((a - b).abs().max()))
    x = torch.randn(3, 48)
    norms = [kind(a_config(sequence_parallel=True), 48, eps=1e-6) for kind in (RMSNorm, ApexRMSNorm)]
    assert all(norm.weight.sequence_parallel and list(norm.state_dict()) == ["weight"] for norm in norms)
    found.append(float((norms[0](x) - norms[1](x)).abs().max()))
    return found


def test_flash_attn_and_apex_are_called_so_that_they_compute_what_ours_does():
    assert max(run_ranks(1, differences)[0]) < 1e-5


def modules_of_the_layer():
    from megatron_davinci.model.spec import layer_spec
    from megatron_davinci.platform.backends import Backends, Choice

    def built(**names):
        fill = {"layers": "local", "attention": "sdpa", "norm": "local", "optimizer": "torch", **names}
        spec = layer_spec(Backends(**{place: Choice(name, "") for place, name in fill.items()}), qk_norm=True)
        attention = spec.submodules.self_attention.submodules
        return [
            module.__name__
            for module in (attention.core_attention, spec.submodules.input_layernorm, attention.q_layernorm)
        ]

    return built(), built(attention="flash_attn", norm="apex")


def test_the_layer_has_what_was_chosen():
    ours, others = run_ranks(1, modules_of_the_layer)[0]
    assert ours == ["SDPAttention", "RMSNorm", "RMSNorm"]
    assert others == ["FlashAttention", "ApexRMSNorm", "ApexRMSNorm"]
