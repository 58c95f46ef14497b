"""Weights & Biases, offline: what is written holds the run's numbers, and every start is one run."""

import json
import struct
import sys

import pytest

from megatron_davinci.errors import DataError, EnvironmentProblem
from megatron_davinci.train.boards import WeightsAndBiases, open_boards
from tests.ranks import run_ranks
from tests.tiny import tiny_config, tiny_settings, train_here

WANDB = {"project": "davinci", "mode": "offline", "tags": ["tiny"]}


def records(path):
    """A `.wandb` file: after 7 bytes, blocks of 32 KiB with records of checksum, length and kind, some in parts."""
    from wandb.proto import wandb_internal_pb2

    raw, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", raw[at + 4 : at + 7])
        part, at = part + raw[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # a whole one, or the last part
            yield wandb_internal_pb2.Record.FromString(part)
            part = b""


def history(path):
    """The rows that were logged, by name."""
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            yield {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }


def train_twice(settings):
    for last in (3, 5):
        train_here({**settings, "train": {**settings["train"], "stop_after_steps": last}})


@pytest.mark.needs("wandb")
def test_a_run_and_its_resumption_are_one_run_with_the_metrics(tmp_path):
    run_ranks(1, train_twice, tiny_settings(tmp_path, logging={"wandb": WANDB}))
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    runs = [
        record.run for file in files for record in records(file) if record.WhichOneof("record_type") == "run"
    ]
    stored = json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    assert {(run.run_id, run.project, run.display_name, *run.tags) for run in runs} == {
        (stored, "davinci", "run", "tiny")
    }
    configured = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert configured["model"]["hidden_size"] == 32
    rows = [row for file in files for row in history(file)]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row, line in zip(rows, lines, strict=True):
        assert row["train/loss"] == line["loss"] and row["train/grad_norm"] == line["grad_norm"]
        assert row["phases/forward"] == line["phases"]["forward"]


def test_not_installed_is_said_before_anything_is_sent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = tiny_config(tmp_path, logging={"wandb": WANDB})
    with pytest.raises(EnvironmentProblem, match="not installed") as said:
        open_boards(tmp_path / "run", tmp_path / "run" / "tensorboard", config, 1)
    assert "megatron-davinci[wandb]" in str(said.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.needs("wandb")
@pytest.mark.parametrize("content", ["", "[]", '{"id"', "{}"])
def test_an_id_that_cannot_be_read_is_not_made_up_again(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb.json").write_text(content)
    config = tiny_config(tmp_path, logging={"wandb": WANDB})
    with pytest.raises(DataError, match=r"wandb\.json"):
        WeightsAndBiases(tmp_path / "run", config.logging.wandb, config)


@pytest.mark.needs("wandb")
def test_a_refusal_by_wandb_says_what_to_do(tmp_path, monkeypatch):
    import wandb

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    config = tiny_config(tmp_path, logging={"wandb": {"project": "p"}})
    with pytest.raises(EnvironmentProblem, match="No API key") as said:
        WeightsAndBiases(tmp_path / "run", config.logging.wandb, config)
    assert "mode=offline" in str(said.value)
