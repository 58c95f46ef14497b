"""The layer's own modules against plain references, and what they refuse."""

import math

import pytest
import torch

from megatron_davinci.errors import ConfigError
from tests.ranks import run_ranks


def a_config(**changes):
    from megatron_davinci.model.build import transformer_config

    config = transformer_config(tiny_config_in_memory())
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def tiny_config_in_memory():
    from megatron_davinci.config import validate

    return validate(
        {
            "run": {"directory": "run"},
            "model": {
                "num_layers": 2,
                "hidden_size": 48,
                "num_attention_heads": 6,
                "num_query_groups": 2,
                "ffn_hidden_size": 64,
                "vocab_size": 64,
                "max_sequence_length": 32,
            },
            "data": {"sequence_length": 32, "sources": {"a": {"path": "a"}}},
            "curriculum": [
                {
                    "name": "1",
                    "tokens": 1024,
                    "mixture": {"a": 1},
                    "global_batch_size": 1,
                    "learning_rate": {"peak": 1},
                }
            ],
            "train": {"precision": "fp32"},
        },
        "tests/model",
    )


def attention_and_reference():
    """Our attention against softmax(q k / sqrt(d)) v in float64, with each key/value head repeated."""
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_davinci.model.attention import SDPAttention

    attend = SDPAttention(a_config(), 1, AttnMaskType.causal, "self").eval()
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(10, 2, 6, 8, generator=generator, requires_grad=True)
    k = torch.randn(10, 2, 2, 8, generator=generator, requires_grad=True)
    v = torch.randn(10, 2, 2, 8, generator=generator, requires_grad=True)
    ours = attend(q, k, v, None)
    q64, k64, v64 = (x.detach().double().permute(1, 2, 0, 3).requires_grad_() for x in (q, k, v))
    scores = q64 @ k64.repeat_interleave(3, 1).transpose(2, 3) / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(10, 10).triu(1).bool(), -math.inf)
    theirs = (scores.softmax(-1) @ v64.repeat_interleave(3, 1)).permute(2, 0, 1, 3).reshape(10, 2, 48)
    weight = torch.randn(10, 2, 48, generator=generator)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    gradients = [
        float((a.grad - b.grad.permute(2, 0, 1, 3)).abs().max()) for a, b in ((q, q64), (k, k64), (v, v64))
    ]
    return float((ours - theirs).abs().max()), max(gradients), tuple(ours.shape)


def test_attention_equals_the_formula_in_float64():
    difference, gradient, shape = run_ranks(1, attention_and_reference)[0]
    assert shape == (10, 2, 48)
    assert difference < 1e-5
    assert gradient < 1e-4


def refusals():
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_davinci.model.attention import SDPAttention

    said = []
    for changes in ({"window_size": (4, 0)}, {"softmax_type": "off-by-one"}):
        try:
            SDPAttention(a_config(**changes), 1, AttnMaskType.causal, "self")
        except ConfigError as error:
            said.append(error.found)
    attend = SDPAttention(a_config(), 1, AttnMaskType.causal, "self")
    x = torch.randn(4, 1, 6, 8)
    packed = PackedSeqParams(qkv_format="thd")
    for mask, documents in ((torch.ones(1, 1, 4, 4).bool(), None), (None, packed)):
        try:
            attend(x, x[:, :, :2], x[:, :, :2], mask, packed_seq_params=documents)
        except NotImplementedError as error:
            said.append(str(error))
    return said


def test_attention_refuses_what_it_would_compute_wrongly():
    said = run_ranks(1, refusals)[0]
    assert said[:2] == ["window_size", "softmax_type"]
    assert "takes no mask" in said[2]
    assert "not packed in another way" in said[3]


def norm_and_reference():
    from megatron_davinci.model.norm import RMSNorm

    norm = RMSNorm(a_config(sequence_parallel=True), 48, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 2, 48, requires_grad=True)
    x64, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    reference = x64 / (x64.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    out, along = norm(x), torch.randn(5, 2, 48)
    (out * along).sum().backward()
    (reference * along).sum().backward()
    differences = [
        (a - b).abs().max()
        for a, b in ((out, reference), (x.grad, x64.grad), (norm.weight.grad, weight.grad))
    ]
    torchs = torch.nn.functional.rms_norm(x, (48,), norm.weight, 1e-6)
    half = norm.to(torch.bfloat16)(x.bfloat16())
    theirs = torch.nn.functional.rms_norm(x.bfloat16(), (48,), norm.weight, 1e-6)
    return (
        float(max(differences)),
        norm.weight.sequence_parallel,
        torch.equal(out, torchs),
        torch.equal(half, theirs),
    )


def test_norm_equals_the_formula_and_is_marked_for_sequence_parallelism():
    difference, marked, as_torchs, as_torchs_in_half = run_ranks(1, norm_and_reference)[0]
    assert difference < 1e-5
    assert marked is True
    assert as_torchs and as_torchs_in_half


def test_norms_gradient_is_that_of_finite_differences():
    from megatron_davinci.model.norm import _RMSNormOnCPU

    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: _RMSNormOnCPU.apply(x, w, 1e-3), (x, weight))


def weights_of(settings):
    """Every weight of this rank by its global name, with its tensor-parallel part."""
    from megatron.core import parallel_state

    from megatron_davinci.config import validate
    from megatron_davinci.model.build import build_model
    from megatron_davinci.model.initialize import global_name
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose

    config, platform = validate(settings, "test"), choose("cpu", threads=1)
    distributed.start(platform, **config.parallel.groups)
    found = {
        global_name(name, chunk): p.detach().numpy()
        for chunk in build_model(config, platform)
        for name, p in chunk.named_parameters()
    }
    part = parallel_state.get_tensor_model_parallel_rank()
    distributed.stop()
    return part, found


def test_one_seed_gives_one_model_on_every_layout(tmp_path):
    import numpy as np

    from tests.tiny import tiny_settings

    (_, whole), *_ = run_ranks(1, weights_of, tiny_settings(tmp_path))
    assert len(whole) == 2 * 7 + 2
    assert np.std(whole["embedding.word_embeddings.weight"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(whole["decoder.layers.0.mlp.linear_fc2.weight"]) == pytest.approx(0.02 / 2, rel=0.1)
    assert not np.array_equal(
        whole["decoder.layers.0.mlp.linear_fc1.weight"], whole["decoder.layers.1.mlp.linear_fc1.weight"]
    )
    parts = run_ranks(4, weights_of, tiny_settings(tmp_path, parallel={"tensor": 2, "pipeline": 2}))
    for part, weights in parts:
        for name, weight in weights.items():
            full = whole[name]
            if name.endswith("linear_fc1.weight"):
                full = np.concatenate(
                    [half.reshape(2, -1, *half.shape[1:])[part] for half in np.split(full, 2)]
                )
            elif weight.shape != full.shape:
                axis = next(a for a in range(full.ndim) if full.shape[a] != weight.shape[a])
                full = np.split(full, 2, axis)[part]
            assert np.array_equal(weight, full), name
    (_, other), *_ = run_ranks(1, weights_of, tiny_settings(tmp_path, run={"seed": 8, "directory": "x"}))
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert not np.array_equal(whole[name], other[name])


def test_all_layers_in_the_one_chunk_that_there_is_are_the_model_without_a_split():
    from tests.config import small
    from tests.stepping import take_all

    splits = {"none": None, "all in one": [2]}
    settings = {
        name: small.settings(parallel={"device": "cpu", "pipeline_layers": split})
        for name, split in splits.items()
    }
    (taken,) = run_ranks(1, take_all, settings)
    assert taken["all in one"] == taken["none"]
