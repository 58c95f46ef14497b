"""What a person sees while a run goes on."""

import io

from rich.console import Console

from megatron_davinci.config.curriculum import Stage
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.progress import RunProgress


def schedule():
    return Schedule(
        [
            Stage(name=name, tokens="1k", mixture={"a": 1}, global_batch_size=4, learning_rate={"peak": 1e-3})
            for name in ("1-1", "[x] [/]")
        ],
        16,
    )


def record(step, stage="1-1"):
    return {
        "step": step,
        "stage": stage,
        "consumed_samples": 4 * step,
        "consumed_tokens": 64 * step,
        "loss": 5.25,
        "grad_norm": 1.5,
        "learning_rate": 1e-3,
        "global_batch_size": 4,
        "tokens_per_second": 640.0,
        "seconds": 0.1,
        "flops_utilization": 0.42,
        "sources": {name: {"loss": loss, "weight": 32} for name, loss in (("a", 5.0), ("b", 5.5))},
        "phases": {"data": 0.0001, "forward": 0.03, "gradient_sync": 0.06, "other": 0.01, "evaluation": 9.0},
    }


def shown(mode, terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None, highlight=False)
    with RunProgress(schedule(), mode, 2, console, domains={"a": "code"}) as progress:
        for step in (1, 2, 3):
            progress.step(record(step, stage="1-1" if step < 3 else "[x] [/]"))
        progress.heldout(3, {"code": 4.5})
    return out.getvalue()


def test_lines_where_there_is_no_terminal():
    lines = shown("auto", terminal=False).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("step      2/32  stage 1-1  loss 5.2500  grad 1.50  lr 1.00e-03  batch 4")
    assert "640 tokens/s  42% of matmul peak  ETA 3 s" in lines[1]
    assert "held-out loss  code 4.500" in lines[2]


def test_a_panel_on_a_terminal():
    panel = shown("auto", terminal=True)
    for part in (
        "davinci train",
        "stage 1-1",
        "stage [x] [/]",
        "5.2500",
        "640",
        "42% of matmul peak",
        "code 4.500",
        "training loss  code 5.000  b 5.500",
        "forward 30%  gradient sync 60%  other 10%",
    ):
        assert part in panel


def test_silence_when_asked():
    assert shown("none", terminal=True) == ""
