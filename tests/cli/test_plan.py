"""`davinci plan` says what a run costs, on the screen and as JSON, and starts nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_davinci.config import load_config
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.plan import plan_run
from megatron_davinci.train.plan_curves import schedule_curves
from megatron_davinci.train.plan_recipes import MEASURED
from tests.cli.screen import davinci

RECIPE = Path(__file__).parents[2] / "examples" / "davinci_3b" / "config.yaml"


def test_the_plan_of_the_davinci_recipe(tmp_path):
    screen = davinci("plan", RECIPE, "--ranks", 256, "--json", tmp_path / "plan.json")
    assert (screen.code, screen.err) == (0, "")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["parameters"] == 3_085_938_688
    assert plan["total_samples"] == 1_953_128_448
    assert plan["total_tokens"] == 1_953_128_448 * 4096
    assert [stage["steps"] for stage in plan["stages"]] == [310_919, 119_209, 59_605, 59_605]
    assert plan["total_steps"] == sum(stage["steps"] for stage in plan["stages"])
    assert [stage["name"] for stage in plan["stages"]] == ["1-1", "1-2", "2-1", "2-2"]
    assert sum(stage["tokens"] for stage in plan["stages"]) == plan["total_tokens"]
    layout = {name: ranks for name, ranks in plan["layout"].items() if ranks > 1}
    assert layout == {"world": 256, "data": 256}
    assert plan["memory"]["total"] == sum(size for part, size in plan["memory"].items() if part != "total")
    assert [plan[f"steps_{name}"] for name in ("1_1", "1_2", "2_1", "2_2")] == [
        310_919,
        119_209,
        59_605,
        59_605,
    ]
    assert plan["step_law"][1] > 10**7
    for shown in (
        "REPEATED MORE THAN 4 TIMES",
        "114,179 GPU hours",
        "nemotron_cc_diverse_qa",
        "3,085,938,688",
        "310,919",
        "1-1",
        "TP1 x PP1 x DP256 = 256 ranks",
        "GiB",
    ):
        assert shown in screen.out


def test_on_80_columns_nothing_is_cut(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = davinci("plan", RECIPE, "--ranks", 256, "--suggest").out
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out
    for name in load_config(RECIPE).data.sources:
        assert re.search(rf"^{name} ", out, re.MULTILINE)
    for row in ("1.5e-7 to 3e-4, constant", "general 18.84%, code 2.61%, science 8.55%, qa 70%"):
        assert all(word in out.split() for word in row.split())
    assert "parallel.virtual_pipeline=3\n" in re.sub(" +\n", "\n", out)


def test_overrides_may_stand_before_and_after_options(tmp_path):
    out = tmp_path / "plan.json"
    for words in (
        ("curriculum.0.tokens=1T", "train.micro_batch_size=4", "--ranks", 4, "--json", out),
        ("--ranks", 4, "--json", out, "curriculum.0.tokens=1T", "train.micro_batch_size=4"),
        ("curriculum.0.tokens=1T", "--ranks", 4, "train.micro_batch_size=4", "--json", out),
    ):
        assert davinci("plan", RECIPE, *words).code == 0
        plan = json.loads(out.read_text())
        assert plan["layout"]["world"] == 4
        assert plan["stages"][0]["steps"] < 310_919
        out.unlink()


def test_products_of_few_bits_are_named_with_their_share():
    recipe = "train.low_precision.recipe=nvfp4"
    out = davinci("plan", RECIPE, recipe, "train.low_precision.keep_last_layers=4").out
    assert "nvfp4 in 32 of 36 layers, 73% of the FLOPs" in out and "no speed of this recipe has been" in out
    rows = {line.split("  ")[0]: line for line in out.split("Recipes on h100")[1].splitlines()}
    assert "18,385 tokens/s, 37.8% of the peak" in rows["bf16"] and "not measured" in rows["current"]
    assert "no such products" in rows["nvfp4"] and "1.57 ×" in rows["block"]
    assert "slower than others" in davinci("plan", RECIPE, recipe, "train.low_precision.backend=emulate").out


def test_speeds_that_are_called_measured_are_on_record():
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    model = load_config(RECIPE).model
    for one in MEASURED:
        file, figure = one.record
        assert json.loads((results / file).read_text())["figures"][figure] == pytest.approx(
            one.tokens_per_second, abs=0.05
        )
        assert one.flops_per_token == pytest.approx(model.flops_per_token(4096), rel=1e-4)


def test_nothing_is_made(in_tmp):
    assert davinci("plan", RECIPE).code == 0
    assert list(in_tmp.iterdir()) == []


def test_it_says_what_it_cannot_plan_for():
    assert "above 0, to 1" in davinci("plan", RECIPE, "--mfu", 1.5).refusal()
    assert "data sheet" in davinci("plan", RECIPE, "--gpu", "abacus").refusal()
    assert "above 0" in davinci("plan", RECIPE, "--peak-tflops", 0).refusal()
    assert "IT DOES NOT FIT" in davinci("plan", RECIPE, "--gpu-memory", 40).out
    unknown = davinci("plan", RECIPE, "data.sources.megamath_web.tokens=null").refusal()
    assert "Domain science is divided by the sizes of its sources" in unknown


def test_the_schedule_is_drawn_as_a_picture_or_a_page(tmp_path):
    assert davinci("plan", RECIPE, "--plot", tmp_path / "plan.png").code == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert davinci("plan", RECIPE, "--plot", tmp_path / "plan.html").code == 0
    page = (tmp_path / "plan.html").read_text()
    assert page.count("<svg") == 3
    for shown in ("Learning rate", "Batch size", "Mixture", "REPEATED MORE THAN 4 TIMES"):
        assert shown in page
    assert ".png, .html" in davinci("plan", RECIPE, "--plot", tmp_path / "plan.pdf").refusal()


def test_the_curves_have_every_corner_of_the_schedule():
    config = load_config(RECIPE)
    curves = schedule_curves(config, plan_run(config, 1))
    rates = dict(zip(curves.tokens, curves.learning_rate, strict=True))
    schedule = Schedule(config.curriculum, 4096)
    assert len(rates) < 5000
    for segment in schedule.segments:
        for sample in (segment.first_sample, segment.end_sample - segment.batch):
            assert rates[sample * 4096] == schedule.at(sample).learning_rate
    # Where the warm-up of the first stage ends.
    assert rates[2000 * 1024 * 4096] == 3e-4
    assert {name: shares[3] for name, shares in curves.shares.items()} == pytest.approx(
        {"general": 0.1884, "code": 0.0261, "science": 0.0855, "qa": 0.7}, abs=1e-6
    )
    assert curves.edges[0] == 0 and curves.edges[-1] == schedule.total_samples * 4096
