"""Rules are one thing in two directions: what goes out comes back, and is what Hugging Face means by it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_davinci.convert.families import FAMILIES
from megatron_davinci.convert.rules import SAME, Cut, GroupedQKV, Heads, Padded, Rule, Stacked, from_hf, to_hf
from megatron_davinci.errors import ConfigError

heads_ = st.builds(
    lambda groups, per_group, dim, padding: Heads(groups * per_group, groups, dim, padding),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(0, 3),
)
columns = st.sampled_from([(), (1,), (3,)])


def numbered(*shape: int) -> torch.Tensor:
    """Every element its own number, so that no two can be exchanged unseen."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


def rows(cut: Cut, heads: Heads, half: int) -> int:
    if isinstance(cut, Padded):
        return half + heads.padding
    return (heads.heads + 2 * heads.groups) * heads.dim if isinstance(cut, GroupedQKV) else 2 * half


def whole_of(cut: Cut, heads: Heads, half: int, rest: tuple[int, ...]) -> torch.Tensor:
    whole = numbered(rows(cut, heads, half), *rest)
    if isinstance(cut, Padded):
        whole[half:] = 0
    return whole


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    cut=st.sampled_from([SAME, GroupedQKV(), Stacked(), Padded()]),
    heads=heads_,
    half=st.integers(1, 5),
    rest=columns,
)
def test_what_is_split_is_merged_and_what_is_merged_is_split(cut, heads, half, rest):
    whole = whole_of(cut, heads, half, rest)
    parts = cut.split(whole, heads)
    assert torch.equal(cut.merge(parts, heads), whole)
    padding = heads.padding * whole[0].numel() if isinstance(cut, Padded) else 0
    assert sum(part.numel() for part in parts) == whole.numel() - padding
    shuffled = [part.flip(0) for part in parts]
    again = cut.split(cut.merge(shuffled, heads), heads)
    assert all(torch.equal(a, b) for a, b in zip(again, shuffled, strict=True))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(heads=heads_, rest=columns)
def test_queries_keys_and_values_are_interleaved_by_group(heads, rest):
    # Megatron-Core, for each key/value head: its query heads, its key, its value.
    per_group, d = heads.heads // heads.groups, heads.dim
    whole = numbered((heads.heads + 2 * heads.groups) * d, *rest)
    q, k, v = GroupedQKV().split(whole, heads)
    assert (len(q), len(k), len(v)) == (heads.heads * d, heads.groups * d, heads.groups * d)
    row = 0
    for group in range(heads.groups):
        for head in range(group * per_group, (group + 1) * per_group):
            assert torch.equal(q[head * d : (head + 1) * d], whole[row : row + d])
            row += d
        for part in (k, v):
            assert torch.equal(part[group * d : (group + 1) * d], whole[row : row + d])
            row += d
    assert row == len(whole)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(heads=heads_, layer=st.integers(0, 99), hidden=st.integers(1, 4), half=st.integers(1, 4))
def test_every_rule_of_every_family_is_its_own_inverse(heads, layer, hidden, half):
    for rule in {rule for family in FAMILIES.values() for rule in family.rules}:
        number = layer if rule.per_layer else None
        whole = whole_of(rule.cut, heads, half, (hidden,))
        tensors = to_hf(rule, whole, number, heads)
        assert len(tensors) == len(rule.hf)
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        assert all((f".{layer}." in name) == rule.per_layer and "{" not in name for name in tensors)
        assert torch.equal(from_hf(rule, tensors, number, heads), whole)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_no_tensor_has_two_rules(family):
    for names in (
        [rule.mcore for rule in family.rules],
        [rule.stored for rule in family.rules],
        [name for rule in family.rules for name in rule.hf] + [zeros.hf for zeros in family.zeros],
    ):
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("when", "tied", "holds"),
    [
        (None, True, True),
        ("tie_embeddings", True, True),
        ("tie_embeddings", False, False),
        ("not tie_embeddings", True, False),
        ("not tie_embeddings", False, True),
    ],
)
def test_a_rule_holds_when_its_field_says_so(when, tied, holds):
    assert Rule("a", ("b",), (), when=when).holds({"tie_embeddings": tied}) is holds


def test_a_model_that_a_family_cannot_hold_is_refused_with_all_reasons():
    with pytest.raises(ConfigError) as caught:
        FAMILIES["qwen2"].check({"qk_norm": True, "qkv_bias": False, "experts": {"number": 8}})
    for said in ("model.qk_norm: True, not False", "model.qkv_bias: False, not True", "model.experts: 8"):
        assert said in str(caught.value)
