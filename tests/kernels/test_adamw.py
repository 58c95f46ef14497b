"""AdamW of many tensors in one launch: against float64, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import adamw_trials
from benchmarks.kernel_bounds import Worst
from megatron_davinci.kernels import moments, spans, ways
from megatron_davinci.kernels.adamw import Update, adamw_, adamw_fp8_moments_, eight_bits_, full_
from tests.cases import cases


def tensors(device, *counts, seed=0):
    """Parameters, gradients, and moments of zeros, of both kinds."""
    g = torch.Generator().manual_seed(seed)
    parameters, gradients = ([torch.randn(n, generator=g).to(device) for n in counts] for _ in range(2))
    full = [[torch.zeros(n, device=device) for n in counts] for _ in range(2)]
    codes = [[torch.zeros(n, dtype=torch.uint8, device=device) for n in counts] for _ in range(2)]
    ranges = [torch.zeros(moments.groups(n), 4, device=device) for n in counts]
    return parameters, gradients, full, [*codes, ranges]


def decoded(codes, ranges, second):
    part = ranges[:, 2:] if second else ranges[:, :2]
    return moments.decode(codes.view(-1), part)


def test_updates_are_float64s_but_for_rounding(device):
    @cases(12)
    @given(st.integers(0, 2**31))
    def of_any_tensors(seed):
        worst = adamw_trials.adamw(seed, device)
        assert worst.ratio <= 1, worst

    of_any_tensors()


def test_a_first_moment_at_the_depth_below_which_they_are_dropped(device):
    worst = adamw_trials.adamw(49668745, device)
    assert worst.ratio <= 1, worst


def test_the_bounds_see_a_wrong_number():
    p, g, m = torch.randn(3, 400, generator=torch.Generator().manual_seed(0)).unbind()
    exact = adamw_trials.Exact(p, g, m, m.square(), Update(1e-3, weight_decay=0.1, step=3))
    for name in ("first", "second", "parameter"):
        numbers, bound = getattr(exact, name), getattr(exact, f"bound_{name}")
        assert (bound / numbers.abs().clamp(min=1e-3)).max() < 1e-5
        for change, caught in ((0.9, False), (1.1, True)):
            wrong, worst = numbers.clone(), Worst()
            wrong[-1] += change * bound[-1]
            worst.see(name, wrong, numbers, bound)
            assert (worst.ratio > 1) == caught
    # A code beside the nearest, and a range that is not the group's.
    codes, ranges = moments.encode(m, second=False)
    for where, change in ((codes, 1), (ranges, 1e-3), (None, 0)):
        other, of = codes.clone(), ranges.clone()
        if where is codes:
            other[7] += change
        if where is ranges:
            of[1, 1] *= 1 + change
        worst = Worst()
        adamw_trials.see_codes(worst, "first", other, of, m.double(), m.double().abs() * 1e-7)
        assert (worst.ratio > 1) == (where is not None), worst


@pytest.mark.parametrize("spread", [0, 1e-6, 0.1, 2, 8, 25])
@pytest.mark.parametrize("second", [False, True])
def test_what_is_decoded_and_encoded_again_has_the_same_codes(device, second, spread):
    g = torch.Generator().manual_seed(1)
    x = (10 ** (spread * torch.randn(128 * 40 + 17, generator=g)).clamp(-37, 18)).to(device)
    x = x * (1 if second else torch.randn(len(x), generator=g).sign().to(device))
    x[:300:7] = 0.0
    codes, ranges = moments.encode(x, second=second)
    found = moments.decode(codes, ranges)
    again, again_ranges = moments.encode(found, second=second)
    assert torch.equal(again, codes) and torch.equal(again_ranges, ranges)
    assert torch.equal(moments.decode(again, again_ranges), found)
    assert not found[x == 0].any() and found.isfinite().all()
    # The largest of each group comes back as it was.
    top = torch.nn.functional.pad(x.abs(), (0, -len(x) % 128)).view(-1, 128).amax(1)
    assert torch.equal(torch.nn.functional.pad(found.abs(), (0, -len(x) % 128)).view(-1, 128).amax(1), top)


def test_the_kernels_own_states_come_through_too(device):
    parameters, gradients, _, states = tensors(device, 5000, 128 * 3)
    for step in range(1, 4):
        adamw_fp8_moments_(parameters, gradients, *states, Update(1e-3, step=step))
    for first, second, ranges in zip(*states, strict=True):
        for codes, part, is_second in ((first, ranges[:, :2], False), (second, ranges[:, 2:], True)):
            again, again_ranges = moments.encode(moments.decode(codes, part), second=is_second)
            assert torch.equal(again, codes) and torch.equal(again_ranges, part)


def test_zeros_stay_zeros_beside_others(device):
    # A zero that does not come back as zero moves a parameter that has no gradient.
    parameters, gradients, _, states = tensors(device, 1024)
    still = torch.arange(1024, device=device) % 3 == 0
    gradients[0][still] = 0.0
    before = parameters[0].clone()
    for step in range(1, 30):
        adamw_fp8_moments_(parameters, gradients, *states, Update(1e-2, step=step))
    assert torch.equal(parameters[0][still], before[still])
    assert (parameters[0][~still] != before[~still]).all()


def test_a_parameter_whose_gradient_ends_comes_to_rest(device):
    # Its moments are not held up by rounding to the nearest code.
    parameters, gradients, _, states = tensors(device, 128)
    moved = []
    for step in range(1, 300):
        if step == 20:
            gradients[0][:5] = 0.0
        before = parameters[0].clone()
        adamw_fp8_moments_(parameters, gradients, *states, Update(1e-2, 0.9, 0.95, step=step))
        moved.append((parameters[0] - before)[:5].abs().max().item())
    assert moved[18] > 5e-3 and moved[-1] == 0


@pytest.mark.parametrize("size", [0.0, 1e-3, 2.0**-121, 1e-40, 2.0**-64, 1e15])
def test_groups_of_one_size(device, size):
    parameters, gradients, _, states = tensors(device, 300)
    gradients[0] = torch.full((300,), size, device=device)
    update = Update(1e-3, 0.9, 0.95, epsilon=1e-8, step=1)
    adamw_fp8_moments_(parameters, gradients, *states, update)
    first, second, ranges = (one[0] for one in states)
    m, v = decoded(first, ranges, False), decoded(second, ranges, True)
    lost = size * 0.1 < moments.LEAST_TOP, size * size * 0.05 < moments.LEAST_TOP
    expected = [0.0 if lost[0] else size * 0.1, 0.0 if lost[1] else size * size * 0.05]
    for found, one in zip((m, v), expected, strict=True):
        torch.testing.assert_close(found, torch.full_like(found, one), rtol=1e-6, atol=0)
    assert parameters[0].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_is_seen_in_the_parameter_and_no_group_but_its_own(device, bad):
    parameters, gradients, _, states = tensors(device, 400)
    gradients[0][130] = bad
    adamw_fp8_moments_(parameters, gradients, *states, Update(1e-3))
    assert parameters[0].isnan().nonzero().flatten().tolist() == [130]
    adamw_fp8_moments_(parameters, [torch.ones_like(gradients[0])], *states, Update(1e-3, step=2))
    group = torch.arange(400, device=device) // 128 == 1
    assert parameters[0][group].isnan().all() and parameters[0][~group].isfinite().all()


@pytest.mark.parametrize("coded", [False, True])
def test_the_same_bits_from_run_to_run_however_tensors_are_cut_into_runs(device, monkeypatch, coded):
    found = []
    for seed in range(3):
        monkeypatch.setenv("DAVINCI_EMULATOR_SEED", str(seed))
        monkeypatch.setattr(spans, "ELEMENTS", 128 * (seed + 1))
        parameters, gradients, full, codes = tensors(device, 700, 50)
        for step in range(1, 3):
            update = Update(1e-3, weight_decay=0.1, step=step)
            if coded:
                adamw_fp8_moments_(parameters, gradients, *codes, update)
            else:
                adamw_(parameters, gradients, *full, update)
        found.append([*parameters, *(one for kind in (codes if coded else full) for one in kind)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_a_clip_coefficient_is_as_good_as_scaled_gradients(device):
    a, b = (tensors(device, 333) for _ in range(2))
    adamw_(a[0], a[1], *a[2], Update(1e-2, gradient_scale=0.25))
    adamw_(b[0], [one * 0.25 for one in b[1]], *b[2], Update(1e-2))
    assert torch.equal(a[0][0], b[0][0]) and torch.equal(a[1][0], b[1][0])


def test_addresses_beyond_what_32_bits_count():
    # Two tensors of 3.1e9 elements would not fit here: what a table says of them does.
    rows = spans._rows([[1 << 40], [0]], [4, 1], [3_100_000_000], spans.ELEMENTS)
    assert rows[:, 6].sum() == 3_100_000_000 and rows[-1, 6] == 3_100_000_000 % spans.ELEMENTS
    assert rows[-1, 0] == (1 << 40) + 4 * (len(rows) - 1) * spans.ELEMENTS
    assert rows[-1, 1] == (len(rows) - 1) * spans.ELEMENTS > 2**31


@pytest.mark.needs("emulator")
def test_a_table_is_made_once_for_the_same_tensors():
    spans._tables.clear()
    with ways.using("emulator"):
        one, other = (tensors("cpu", 200, 0, 31) for _ in range(2))
        for case, tables in ((one, 1), (one, 1), (other, 2)):
            adamw_(case[0], case[1], *case[2], Update(1e-3))
            assert len(spans._tables) == tables


def test_moments_where_those_of_another_kind_were_have_a_table_of_their_own():
    # An optimizer that is made behind another one may get its memory, address by address.
    spans._tables.clear()
    p, g, m, v, last = ([torch.zeros(spans.ELEMENTS + 1)] for _ in range(5))
    full = spans.table([(p, 4), (g, 4), (m, 4), (v, 4), ((), 0), (last, 2)])
    coded = spans.table([(p, 4), (g, 4), (m, 1), (v, 1), (last, 1 / 8), ((), 0)])
    for rows, width, place, empty in ((full, 4, 5, 4), (coded, 1, 4, 5)):
        assert rows[1, 2] - rows[0, 2] == width * spans.ELEMENTS
        assert rows[0, place] == last[0].data_ptr() and not rows[:, empty].any()


def test_nothing_to_update(device):
    for counts in ((), (0,), (0, 0)):
        parameters, gradients, full, codes = tensors(device, *counts)
        adamw_(parameters, gradients, *full, Update(1e-3))
        adamw_fp8_moments_(parameters, gradients, *codes, Update(1e-3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, g, m, v: (p, g[:1], m, v), "1 gradients for 2 parameters"),
        (lambda p, g, m, v: (p, [g[0], g[1][:3]], m, v), r"gradients\[1\] is \[3\], not \[9\]"),
        (
            lambda p, g, m, v: (p, [g[0].half(), g[1]], m, v),
            r"gradients\[0\] is torch.float16, not torch.float32",
        ),
        (lambda p, g, m, v: ([p[0], p[1].bfloat16()], g, m, v), r"parameters\[1\] is torch.bfloat16"),
        (lambda p, g, m, v: (p, g, m, [v[0], v[1].byte()]), r"second\[1\] is torch.uint8"),
    ],
)
def test_what_does_not_go_together_is_refused(change, message):
    parameters, gradients, full, _ = tensors("cpu", 8, 9)
    with pytest.raises(ValueError, match=message):
        adamw_(*change(parameters, gradients, *full), Update(1e-3))


def test_codes_and_copies_that_do_not_fit_are_refused():
    parameters, gradients, full, codes = tensors("cpu", 200)
    with pytest.raises(ValueError, match=r"ranges\[0\] is \[1, 4\] torch.float32, not \[2, 4\]"):
        adamw_fp8_moments_(parameters, gradients, *codes[:2], [codes[2][0][:1]], Update(1e-3))
    with pytest.raises(ValueError, match=r"first\[0\] is torch.float32, not torch.uint8"):
        adamw_fp8_moments_(parameters, gradients, *full, codes[2], Update(1e-3))
    with pytest.raises(ValueError, match=r"copies\[0\] is torch.float32, not torch.bfloat16"):
        adamw_(parameters, gradients, *full, Update(1e-3), [parameters[0].clone()])


@pytest.mark.parametrize("coded", [False, True])
def test_opcheck(device, coded):
    parameters, gradients, full, codes = tensors(device, 200, 3)
    numbers = (1e-3, 0.9, 0.95, 1e-8, 0.1, 1, 1.0)
    copies = [one.bfloat16() for one in parameters]
    states = codes if coded else full
    torch.library.opcheck(
        eight_bits_ if coded else full_,
        (parameters, gradients, *states, copies, *numbers),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
