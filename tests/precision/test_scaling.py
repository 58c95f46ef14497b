"""Scales, the Hadamard transform and the recipes' operands."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.precision import formats, hadamard, recipes
from megatron_davinci.precision.formats import E2M1, E4M3, E5M2
from megatron_davinci.precision.products import emulated
from megatron_davinci.precision.scaling import Quantizer, quantize
from tests.cases import cases


def drawn(seed: int, rows: int = 128, columns: int = 128) -> torch.Tensor:
    """Rows and columns of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(rows, 1, generator=generator) + torch.randn(1, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) * torch.exp(2 * spread)


@pytest.mark.parametrize("how", [Quantizer(E4M3), Quantizer(E5M2)], ids=["E4M3", "E5M2"])
def test_a_tensor_s_largest_number_becomes_the_format_s(how):
    x = drawn(0)
    q = quantize(x, how)
    assert q.values.abs().max() == how.form.top and q.amax == x.abs().max()
    scale = how.form.top / x.abs().max()
    assert torch.equal(q.values, (x * scale).to(how.form.dtype).float())
    assert torch.equal(q.dequantized(), q.values * (1 / scale))
    small = quantize(x, how, amax=x.abs().max() / 4, watch=True)  # a scale that is out of date
    assert small.values.abs().max() == how.form.top and small.lost.overflow > 0


def test_blocks_of_128_have_powers_of_two():
    x = drawn(1, 256, 256)
    for how, shape in (
        (recipes.block_scaled().input, (256, 2, 1)),
        (recipes.block_scaled().weight, (2, 1, 2, 1)),
    ):
        q = quantize(x, how)
        assert q.inverse.shape == shape
        assert torch.equal(formats.power_of_two_above(q.inverse), q.inverse)
        tops = q.values.view(q.blocked).abs().amax((1, 3) if len(shape) == 4 else 2)
        assert bool(((tops > 448 / 2 * 0.96) & (tops <= 448)).all())


def test_mx_is_the_microscaling_format():
    """Against the definition, block by block: a scale of 8 bits, and E4M3 of what is left."""
    x = drawn(2, 16, 96)
    q = quantize(x, recipes.mxfp8().input)
    for row in range(16):
        for block in range(3):
            part = x[row, 32 * block : 32 * block + 32]
            power = 2.0 ** torch.log2(part.abs().max().double() / 448).ceil()
            assert q.inverse[row, block, 0] == power
            expected = (part / power).to(torch.float8_e4m3fn).float()
            assert torch.equal(q.values[row, 32 * block : 32 * block + 32], expected.float())


def test_nvfp4_is_two_levels_of_scales():
    """Against the definition of arXiv 2509.25149, appendix B, block by block."""
    x = drawn(3, 8, 64)
    x[0, :16] = 0
    q = quantize(x, recipes.nvfp4(seed=1).input)
    whole = torch.tensor(6.0 * 448) / x.abs().max()
    for row in range(8):
        for block in range(4):
            part = x[row, 16 * block : 16 * block + 16]
            stored = (part.abs().max() / 6 * whole).to(torch.float8_e4m3fn).float()
            encode = 1 / (stored * (1 / whole)) if stored > 0 else torch.tensor(0.0)
            expected = formats.round_to(part * encode, E2M1)
            assert torch.equal(q.values[row, 16 * block : 16 * block + 16], expected)
            assert torch.equal(
                q.dequantized()[row, 16 * block : 16 * block + 16], expected * (stored * (1 / whole))
            )


@cases(20)
@given(st.integers(0, 2**31), st.sampled_from(["nvfp4", "block", "delayed"]))
def test_tiles_are_the_same_from_both_sides(seed, name):
    """Q(wᵀ) = Q(w)ᵀ where weights have tiles or one scale."""
    how = {
        "nvfp4": recipes.nvfp4(seed=0).weight,
        "block": recipes.block_scaled().weight,
        "delayed": recipes.tensor_scaled(delayed=True).weight,
    }[name]
    w = drawn(seed, 128, 256)
    assert how.transposes
    assert torch.equal(quantize(w, how).dequantized().t(), quantize(w.t().contiguous(), how).dequantized())


def test_blocks_of_a_row_are_not_the_same_from_both_sides():
    how = recipes.nvfp4(seed=0, tiles=False).weight
    w = drawn(4, 128, 128)
    assert not how.transposes
    assert not torch.equal(
        quantize(w, how).dequantized().t(), quantize(w.t().contiguous(), how).dequantized()
    )


@cases(20)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(0, 2**62))
def test_the_hadamard_transform_is_undone_and_keeps_products(draw, blocks, seed):
    x = torch.randint(-1000, 1000, (7, 16 * blocks), generator=torch.Generator().manual_seed(draw)).float()
    y = torch.randint(
        -1000, 1000, (5, 16 * blocks), generator=torch.Generator().manual_seed(draw + 1)
    ).float()
    # Sums of 16 whole numbers times a power of two: exact in fp32, so exactly undone.
    a, b = hadamard.transform(x, seed), hadamard.transform(y, seed)
    assert torch.equal(hadamard.transform(a, seed, inverse=True), x)
    assert torch.equal(a.double() @ b.double().t(), x.double() @ y.double().t())
    h = hadamard.matrix(seed, torch.device("cpu"))
    assert torch.equal(h @ h.t(), torch.eye(16)) and set(h.abs().flatten().tolist()) == {0.25}


def test_an_outlier_is_spread():
    x = torch.zeros(1, 16)
    x[0, 5] = 8.0
    assert hadamard.transform(x, 3).abs().max() == 2.0


EVERY = {
    "delayed": recipes.tensor_scaled(delayed=True),
    "current": recipes.tensor_scaled(delayed=False),
    "block": recipes.block_scaled(),
    "mxfp8": recipes.mxfp8(),
    "nvfp4": recipes.nvfp4(seed=0),
    "E8M3": recipes.bit_reduction(formats.parse("E8M3"), truncate=True, scaled=False),
}
WORST = {"delayed": 0.07, "current": 0.07, "block": 0.07, "mxfp8": 0.07, "nvfp4": 0.35, "E8M3": 0.07}


@pytest.mark.parametrize("name", EVERY)
def test_the_error_of_ordinary_numbers_is_the_format_s(name):
    x = torch.randn(128, 256, generator=torch.Generator().manual_seed(5))
    recipe = EVERY[name]
    for how in (recipe.input, recipe.weight):
        error = (quantize(x, how).dequantized() - x).norm() / x.norm()
        assert 0.005 < error < WORST[name]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("fill", [0.0, 1e-38, 1e38])
def test_extremes_have_finite_scales(name, fill):
    for how in (EVERY[name].input, EVERY[name].weight, EVERY[name].gradient):
        noise = torch.zeros(128, 128)
        back = quantize(torch.full((128, 128), fill), how, noise=noise).dequantized()
        assert back.isfinite().all()
        assert fill or not back.any()


@pytest.mark.parametrize("name", [name for name in EVERY if name != "E8M3"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_number_is_seen_in_the_largest_and_in_the_result(name, bad):
    x = torch.ones(128, 128)
    x[3, 4] = bad
    q = quantize(x, EVERY[name].input)
    assert not q.amax.isfinite() and not q.dequantized().isfinite().all()


@pytest.mark.parametrize(
    "how", [recipes.mxfp8().input, recipes.block_scaled().weight, recipes.nvfp4(seed=0).weight]
)
def test_blocks_that_do_not_divide_are_refused(how):
    with pytest.raises(ValueError, match="is not of whole blocks of"):
        quantize(torch.ones(24, 24), how)


@pytest.mark.parametrize("name", ["current", "block", "mxfp8", "nvfp4"])
def test_no_rows_are_no_error(name):
    recipe = {"block": recipes.block_scaled(), "mxfp8": recipes.mxfp8(), "nvfp4": recipes.nvfp4(seed=1)}
    for how in vars(recipe.get(name, recipes.tensor_scaled(delayed=False))).values():
        if isinstance(how, Quantizer):
            found = quantize(torch.empty(0, 128), how, noise=torch.empty(0, 128))
            assert found.dequantized().shape == (0, 128) and found.amax == 0


def test_what_is_lost_is_counted():
    x = torch.tensor([[1e-9, 1.0, 0.0, 448.0]])
    lost = quantize(x, Quantizer(E4M3), watch=True).lost
    assert (lost.underflow, lost.overflow, lost.scale) == (0.25, 0, 1)
    lost = quantize(x, Quantizer(E4M3), amax=torch.tensor(224.0), watch=True).lost
    assert (lost.underflow, lost.overflow, lost.scale) == (0.25, 0.25, 2)


@pytest.mark.parametrize("name", ["E5M7", "E6M7", "E7M7", "E8M7"])
def test_scaled_numbers_of_any_range_have_products_that_fp32_holds(name):
    one = recipes.bit_reduction(formats.parse(name), truncate=False, scaled=True).input
    a, b = drawn(7), 1e-4 * drawn(8)
    made = emulated(quantize(a, one), quantize(b, one), torch.float32)
    assert (made - a @ b.t()).norm() < 0.005 * (a @ b.t()).norm()


def test_ranks_that_hold_parts_have_one_scale():
    x = drawn(6)
    whole = quantize(x, recipes.nvfp4(seed=0).weight)
    part = quantize(
        x[:64], recipes.nvfp4(seed=0).weight, largest=lambda mine: torch.maximum(mine, x.abs().max())
    )
    assert torch.equal(part.dequantized(), whole.dequantized()[:64])
