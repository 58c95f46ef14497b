"""Rotary positions in place against float64 and Megatron-Core, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import kernel_trials
from megatron_davinci.kernels import rope
from megatron_davinci.kernels.rope import Heads, rotate_, rotation_table
from tests.cases import cases

HEADS = Heads(groups=2, heads=5, rotated=4)  # three queries, their key, and a value that does not turn
CHANNELS, PLACES, BATCH = 16, 6, 2


def angles():
    first = torch.outer(
        torch.arange(PLACES).float(), 10_000 ** -(torch.arange(CHANNELS // 2) / (CHANNELS / 2))
    )
    return torch.cat([first, first], -1)


def a_case(device="cpu", dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(PLACES, BATCH, HEADS.groups * HEADS.heads * CHANNELS, generator=g)
    bias = torch.randn(x.shape[-1], generator=g)
    return x.to(device, dtype), rotation_table(angles().to(device)), bias.to(device, dtype)


def test_heads_and_gradients_are_float64s_but_for_rounding(device):
    @cases(8)
    @given(st.integers(0, 2**31))
    def on_any_layout(seed):
        worst = kernel_trials.TRIALS["rope"](seed, device)
        assert worst.ratio <= 1, worst

    on_any_layout()


def test_queries_and_keys_turn_as_in_megatron_core(device):
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    x, table, _ = a_case(device)
    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
    heads = x.view(PLACES, BATCH, HEADS.groups, HEADS.heads, CHANNELS)
    queries, keys, values = heads.split([3, 1, 1], -2)
    expected = [
        apply_rotary_pos_emb(
            part.flatten(2, 3), angles()[:, None, None].to(device), config, cp_group=object()
        )
        for part in (queries, keys)
    ]
    out = rotate_(x.clone(), table, HEADS).view_as(heads)
    queries, keys, same = out.split([3, 1, 1], -2)
    for found, right in zip((queries, keys), expected, strict=True):
        torch.testing.assert_close(found.flatten(2, 3), right)
    assert torch.equal(same, values)


def test_positions_choose_rows_of_the_table(device):
    x, table, _ = a_case(device)
    # As the place in the sequence has it, and as in two documents of which the second begins anew.
    places = torch.arange(PLACES, device=device).unsqueeze(1).expand(PLACES, BATCH).contiguous()
    assert torch.equal(rotate_(x.clone(), table, HEADS, positions=places), rotate_(x.clone(), table, HEADS))
    anew = places % 4
    by_token = table[anew].view(PLACES, BATCH, 1, CHANNELS)  # as the model hands them on
    assert torch.equal(rotate_(x.clone(), table, HEADS, positions=anew), rotate_(x.clone(), by_token, HEADS))


def test_it_is_in_place_and_turning_back_undoes_it(device):
    x, table, _ = a_case(device)
    leaf = x.clone().requires_grad_()
    made = leaf * 1
    place = made.data_ptr()
    out = rotate_(made, table, HEADS)
    assert out.data_ptr() == place and not torch.equal(out, x)
    (back,) = torch.autograd.grad(out, leaf, out.detach())
    torch.testing.assert_close(back, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_from_run_to_run_in_whatever_order_threads_run(device, dtype, monkeypatch):
    x, table, bias = a_case(device, dtype)
    found = []
    for seed in range(2):
        monkeypatch.setenv("DAVINCI_EMULATOR_SEED", str(seed))
        leaf, given_bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
        out = rotate_(leaf * 1, table, HEADS, bias=given_bias)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), (leaf, given_bias))))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_no_tokens(device):
    x, table, bias = a_case(device)
    bias.requires_grad_()
    rotate_(x[:0], table, HEADS, bias=bias).sum().backward()
    assert not bias.grad.any()


def test_more_tokens_than_a_kernel_counts_are_refused():
    x = torch.empty(2**31, 2, device="meta", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="2147483648 tokens of 2 channels: fewer than 2\\^31 of each"):
        rotate_(x, torch.empty(2**31, 2, device="meta"), Heads(1, 1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, t, b: (x[..., :-1].contiguous(), t, b, None), "has not the 160 channels"),
        (lambda x, t, b: (x.transpose(0, 1), t, b, None), "not contiguous"),
        (lambda x, t, b: (x, t.double(), b, None), "the table is torch.float64"),
        (lambda x, t, b: (x, t, b.bfloat16(), None), "the bias is torch.bfloat16"),
        (lambda x, t, b: (x, t[:5], b, None), "12 tokens are no multiple of the table's 5 places"),
        (lambda x, t, b: (x, t, b, torch.zeros(12, dtype=torch.int64)), r"positions are torch.int64 \[12\]"),
    ],
)
def test_what_does_not_go_together_is_refused(change, message):
    x, table, bias, positions = change(*a_case())
    with pytest.raises(ValueError, match=message):
        rotate_(x, table, HEADS, bias=bias, positions=positions)


@pytest.mark.parametrize("wrong", [-1, PLACES])
def test_a_position_without_a_row_is_refused(wrong):
    # Torch would count -1 from the table's end, and a kernel read what lies before it.
    x, table, _ = a_case()
    positions = torch.zeros(x.shape[:-1], dtype=torch.int64)
    positions[1, 1] = wrong
    before = x.clone()
    with pytest.raises(ValueError, match=f"a position is {wrong}, and the table has rows 0 to {PLACES - 1}"):
        rotate_(x, table, HEADS, positions=positions)
    assert torch.equal(x, before)


def test_opcheck(device):
    x, table, bias = a_case(device)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    numbers = (HEADS.groups, HEADS.heads, HEADS.rotated)
    torch.library.opcheck(rope.rotated_.made, (x, bias, table, None, *numbers), test_utils=tests)
    for biased in (False, True):
        torch.library.opcheck(rope.backward.made, (x, table, None, *numbers, biased), test_utils=tests)
