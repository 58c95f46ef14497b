"""The run directory is the record of the run."""

import json
from types import SimpleNamespace

import pytest

from megatron_davinci.config import load_config, validate
from megatron_davinci.errors import DataError, DavinciError
from megatron_davinci.train.progress import format_seconds
from megatron_davinci.train.run_directory import RunDirectory, last_lines, read_lines
from tests.ranks import run_ranks
from tests.tiny import tiny_config, tiny_settings, train_here

FACTS = {"seed": 7, "sequence_length": 32, "data_fingerprints": {"a": "1"}}


def test_a_run_leaves_everything_that_decided_it(tmp_path):
    settings = tiny_settings(
        tmp_path, logging={"progress": "none", "tensorboard": True}, checkpoint={"every_steps": 20, "keep": 2}
    )
    run_ranks(1, train_here, settings)
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "domains.json",
        "evals.jsonl",
        "journal.jsonl",
        "manifest.json",
        "metrics.jsonl",
        "ranks",
        "saves.jsonl",
        "tensorboard",
    }
    assert run.stat().st_mode & 0o007 == 0  # nobody outside the group looks into it
    assert load_config(run / "config.yaml") == tiny_config(
        tmp_path, logging={"progress": "none", "tensorboard": True}, checkpoint={"every_steps": 20, "keep": 2}
    )
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["seed"] == 7 and set(manifest["data_fingerprints"]) == {"a", "b"}
    assert manifest["packages"]["megatron-core"].startswith("0.16")
    assert manifest["platform"]["layout"] == "TP1 x PP1 x DP1 = 1 ranks"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "LATEST",
        "step-00000040",
        "step-00000050",
    ]
    assert any((run / "tensorboard").iterdir())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["consumed_tokens"] == steps[-1]["consumed_samples"] * 32
    assert all(0 < s["flops_utilization"] < 2 and s["tokens_per_second"] > 0 for s in steps)
    evals = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    assert [(e["step"], e["stage"]) for e in evals] == [(30, "first"), (50, "second")]
    records = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    assert [(r["first_sample"], r["stage"]) for r in records] == [(0, "first"), (12 * 4 + 18 * 8, "second")]


def test_lines_of_steps_that_will_be_taken_again_are_dropped(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    directory.truncate_after(2)
    assert directory.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_lines_with_bytes_that_are_no_text_are_dropped_too(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.metrics.write_bytes(b'{"step": 1}\n\xff\xfe\x00{"step": 2}\n\x00\x00\x00\n{"step": 2}\n')
    directory.truncate_after(2)
    assert directory.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00\n", b"5\n", b"[1]\n", b'{"step": 3\n'])
def test_a_record_that_is_damaged_is_named_by_its_line(tmp_path, damage):
    path = tmp_path / "evals.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'{"step": 2}\n')
    with pytest.raises(DataError, match="A record is damaged") as error:
        read_lines(path)
    assert str(error.value.where) == f"{path}, line 2"
    assert [line["step"] for line in last_lines(path, 5)] == [1, 2]


def test_the_last_lines_are_found_however_long_they_are(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "sources": "x" * 10**5}) + "\n" for step in range(1, 8)]
    path.write_text("".join(lines) + lines[0][:50])
    assert [line["step"] for line in last_lines(path, 1)] == [7]
    assert [line["step"] for line in last_lines(path, 5)] == [3, 4, 5, 6, 7]
    assert len(last_lines(path, 20)) == 7 and last_lines(tmp_path / "none", 1) == []


def test_what_a_run_looks_back_on_is_read_from_the_end_of_its_record(tmp_path):
    # A hole that takes no disk, and longer to read than a start may last.
    lines = [
        {
            "step": n,
            "stage": "first",
            "global_batch_size": 4,
            "consumed_samples": 4 * n,
            "loss": 2.0,
            "grad_norm": 1.0,
        }
        for n in range(101, 117)
    ]
    with open(tmp_path / "metrics.jsonl", "wb") as file:
        file.truncate(1 << 28)
        file.seek(0, 2)
        file.write(b"\n" + "".join(json.dumps(line) + "\n" for line in lines).encode())
    assert run_ranks(1, looked_back_on, tiny_settings(tmp_path), tmp_path) == [16]


def looked_back_on(settings, folder):
    """How many steps a run knows when it begins, of the least that it may look back on."""
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose
    from megatron_davinci.train.health import Health

    distributed.start(choose("cpu", threads=1))
    config = validate({**settings, "health": {"spikes": {"window": 16, "least": 8}}}, where="test")
    order = SimpleNamespace(mixture_at=lambda sample: SimpleNamespace(first_sample=0))
    health = Health(config, order, RunDirectory(folder), SimpleNamespace())
    health.begin()
    return len(health._window._loss)


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    settings = tiny_settings(tmp_path, checkpoint={"every_steps": 1})
    for stage in settings["curriculum"]:
        stage["learning_rate"] = {"peak": 1e12}
    settings["optimizer"] = {"clip_grad_norm": 0.0}
    with pytest.raises(DavinciError) as error:
        run_ranks(1, train_here, settings)
    assert "not finite" in str(error.value) and "samples" in str(error.value)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (61, "1:01 min"), (3725, "1:02 h"), (90000, "1 d 1 h")]
)
def test_durations_read_well(seconds, text):
    assert format_seconds(seconds) == text
