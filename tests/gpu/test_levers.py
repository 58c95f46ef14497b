"""Levers that act on CUDA only, in real runs: each follows the run without it."""

import json
import subprocess
import sys

import pytest
import yaml

from tests.gpu.steady import steady_settings

pytestmark = pytest.mark.gpu

# Sizes that FP8 multiplies at a time, and a head of 64 channels for the kernels of real models.
SIZES = {"hidden_size": 256, "ffn_hidden_size": 512}
# Hopper's tensor cores keep some 14 bits of a sum of products of FP8 (DeepSeek-AI, 2024, arXiv 2412.19437, section
# 3.5.2), until it is added to one in fp32: this part of the sizes of what is summed.
OF_A_SUM = 2.0**-13
engine = pytest.mark.skipif(
    subprocess.run(
        [sys.executable, "-c", "import transformer_engine.pytorch"], capture_output=True
    ).returncode
    != 0,
    reason="needs transformer-engine",
)


def losses(root, name, **changes):
    settings = steady_settings(root, run={"directory": str(root / name), "seed": 7})
    settings["model"] |= SIZES
    settings["parallel"] = {"device": "cuda"}
    settings["train"] = {"micro_batch_size": 2, "precision": "bf16", "stop_after_steps": 20}
    for section, keys in changes.items():
        settings[section] = {**settings.get(section, {}), **keys}
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "megatron_davinci.cli.main", "train", str(path), "--ranks", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["loss"] for line in (root / name / "metrics.jsonl").read_text().splitlines()]


def difference(a, b):
    return max(abs(x - y) / y for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    root = tmp_path_factory.mktemp("levers")
    return root, losses(root, "plain", backends={"layers": "local"})


@pytest.mark.parametrize(
    "recompute",
    [{"granularity": "full"}, {"granularity": "selective", "modules": ["core_attn", "layernorm", "mlp"]}],
    ids=["full", "selective"],
)
def test_recomputation_follows_the_run_without(plain, recompute):
    root, expected = plain
    train = {"recompute": recompute}
    assert difference(losses(root, "recompute", backends={"layers": "local"}, train=train), expected) <= 1e-3


def test_deterministic_runs_are_equal_to_the_bit(plain):
    root, expected = plain
    train = {"deterministic": True}
    first, second = (
        losses(root, f"deterministic-{n}", backends={"layers": "local"}, train=train) for n in (1, 2)
    )
    assert first == second
    assert difference(first, expected) <= 0.02


def test_cuda_graphs_follow_the_run_without(plain):
    root, expected = plain
    changes = {"backends": {"layers": "local"}, "train": {"cuda_graphs": True}}
    assert difference(losses(root, "graphs", **changes), expected) <= 1e-3


@engine
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_offloaded_state_follows_the_run_without(plain, fraction):
    root, expected = plain
    changes = {"backends": {"layers": "local"}, "optimizer": {"cpu_offload": fraction}}
    assert difference(losses(root, f"offload-{fraction}", **changes), expected) <= 0.02


@engine
@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
@pytest.mark.parametrize("parameters", [False, True])
def test_fp8_follows_bf16_and_is_not_bf16(plain, recipe, parameters):
    root, expected = plain
    train = {"low_precision": {"recipe": recipe, "parameters": parameters, "backend": "transformer_engine"}}
    found = losses(root, f"fp8-{recipe}-{parameters}", train=train)
    assert 1e-6 < difference(found, expected) <= 0.1


@pytest.mark.parametrize(
    ("recipe", "backend"),
    [("delayed", "native"), ("current", "native"), ("current", "emulate"), ("nvfp4", "emulate")],
)
def test_our_own_products_of_few_bits_follow_bf16_and_are_not_bf16(plain, recipe, backend):
    root, expected = plain
    train = {"low_precision": {"recipe": recipe, "backend": backend, "watch_every_steps": 5}}
    found = losses(root, f"own-{recipe}-{backend}", train=train)
    assert 1e-6 < difference(found, expected) <= 0.15


@pytest.mark.parametrize("left", ["E4M3", "E5M2"])
def test_torch_s_fp8_products_are_the_emulated_ones(left):
    import torch

    from megatron_davinci.precision import formats, products
    from megatron_davinci.precision.scaling import Quantizer, quantize
    from tests.precision.test_products import native, ulps

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(256, 128, generator=generator).cuda()
    b = (torch.randn(64, 128, generator=generator) / 100).cuda()
    one, other = quantize(a, Quantizer(formats.parse(left))), quantize(b, Quantizer(formats.E4M3))
    ours, theirs = (f(one, other, torch.bfloat16) for f in (native, products.emulated))
    sizes = one.dequantized().abs() @ other.dequantized().abs().t()
    near = (ours - theirs).float().abs() <= OF_A_SUM * sizes  # where a sum is next to nothing
    assert int(ulps(ours, theirs).masked_fill(near, 0).max()) <= 1


@pytest.mark.parametrize("kinds", [("rows", "tiles"), ("rows", "tiles turned"), ("rows", "rows")])
def test_hopper_s_products_of_blocks_are_the_emulated_ones(kinds):
    import torch

    from megatron_davinci.kernels.quantize import quantize as in_codes
    from megatron_davinci.platform.backends import native_problem
    from megatron_davinci.precision import products
    from megatron_davinci.precision.scaling import quantize
    from tests.precision.test_products import BLOCKS

    if (why := native_problem("block")) is not None:
        pytest.skip(why)
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(rows, 640, generator=generator).cuda() for rows in (384, 512)]
    left, right = (one.bfloat16() for one in matrices)
    if kinds[1] == "tiles turned":
        of_right = in_codes(
            right.t().contiguous(), torch.float8_e4m3fn, "tiles", plain=False, turned=True
        ).turned
    else:
        of_right = in_codes(right, torch.float8_e4m3fn, kinds[1]).plain
    codes = [in_codes(left, torch.float8_e4m3fn, "rows").plain, of_right]
    emulated = [quantize(left.float(), BLOCKS["rows"]), quantize(right.float(), BLOCKS[kinds[1].split()[0]])]
    sizes = emulated[0].dequantized().abs() @ emulated[1].dequantized().abs().t()
    for dtype, of_result in ((torch.float32, 0.0), (torch.bfloat16, 2.0**-7)):
        ours, theirs = products.native(*codes, dtype), products.emulated(*emulated, dtype)
        assert ((ours - theirs).float().abs() <= OF_A_SUM * sizes + of_result * theirs.float().abs()).all()


def test_flash_attn_follows_sdpa(plain):
    pytest.importorskip("flash_attn", reason="needs flash-attn")
    root, expected = plain
    found = losses(root, "flash", backends={"layers": "local", "attention": "flash_attn"})
    assert difference(found, expected) <= 0.02


def test_memory_on_cuda_is_within_15_percent_of_the_plan():
    from benchmarks.live_bytes import measure
    from megatron_davinci.config import check_layout, validate
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose
    from megatron_davinci.train.memory import plan_memory
    from tests.train.test_memory import whole

    settings = whole(precision="bf16", micro=4, device="cuda")
    settings["model"] |= {**SIZES, "num_layers": 8}
    settings["backends"] = {"layers": "local"}
    config = validate(settings, "test")
    platform = choose("cuda")
    distributed.start(platform)
    measured = measure(settings, platform)
    distributed.stop()
    assert plan_memory(config, check_layout(config, 1)).total == pytest.approx(measured["total"], rel=0.15)
