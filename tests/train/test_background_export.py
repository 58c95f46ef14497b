"""Exports beside training: they appear, training never waits for one, and whatever happens to one stops no run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_davinci.config.training import CheckpointConfig
from megatron_davinci.errors import ConfigError, EnvironmentProblem, Stopped
from megatron_davinci.platform import background_process
from megatron_davinci.platform.background_process import try_lock
from megatron_davinci.train import background_export, checkpoint_files, export_check
from megatron_davinci.train.background_export import BackgroundExport
from megatron_davinci.train.export_job import ExportJob
from megatron_davinci.train.run_directory import RunDirectory
from megatron_davinci.train.signals import WATCH, SignalWatch
from tests import tiny
from tests.cli.screen import davinci, davinci_on_a_rank
from tests.cli.test_train import launched
from tests.ranks import run_ranks

COPY = 'mkdir "$1" && cp "$0/state/a" "$1"'
WHEN_TOLD = f'while [ ! -e "$1.go" ]; do sleep 0.01; done; {COPY}'


def records(run: Path) -> list[tuple[int, str]]:
    path = run / "exports.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["step"], line["event"]) for line in lines]


def until(there: Any, seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := there()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


# ---- in a run


def train_with_a_script(settings: dict[str, Any], script: str) -> int:
    background_process.NICE = 0
    ExportJob.command = lambda self, config: ["sh", "-c", script, str(self.source), str(self.out)]  # type: ignore[method-assign]
    return tiny.train_here(settings)


def settings_of(root: Path, **export: Any) -> dict[str, Any]:
    return tiny.tiny_settings(
        root,
        parallel={"distributed_optimizer": True},
        train={"stop_after_steps": 6},
        checkpoint={"every_steps": 2, "keep": 1, "export_hf": {"every": 4, **export}},
        evaluation={"sequences": 1},
    )


def test_training_does_not_wait_and_is_not_stopped_by_what_fails(tmp_path):
    settings, run = settings_of(tmp_path, dtype="bfloat16", verify=False), tmp_path / "run"
    # If a step waited for the export of step 4, neither would ever end.
    past = f'while ! grep -q "\\"step\\": 6," {run}/metrics.jsonl; do sleep 0.1; done'
    script = f'test -e "$0/state/.metadata" && {past}; echo "error: it broke"; exit 3'
    assert run_ranks(2, train_with_a_script, settings, script) == [6, 6]
    assert records(run) == [(4, "export_failed"), (6, "export_failed")]
    line = json.loads((run / "exports.jsonl").read_text().splitlines()[0])
    assert line["error"] == "exit code 3: error: it broke"
    assert sorted(path.name for path in (run / "hf").iterdir()) == [
        ".exporting",
        "step-00000004.log",
        "step-00000006.log",
    ]
    assert not list((run / "checkpoints").glob(".*")), "no link is left"
    # What the process would have run, in a process that has torch imported already.
    job = ExportJob(run, 6)
    job.link()
    words = job.command(tiny.validate(settings, "test").checkpoint.export_hf)
    assert words[:3] == [sys.executable, "-m", "megatron_davinci.cli.main"]
    screen = davinci_on_a_rank(*words[3:])
    assert screen.code == 0, screen.err
    card = (job.out / "README.md").read_text()
    assert "step 6" in card and "Not verified" in card and "bfloat16" in card


@pytest.mark.long
def test_a_run_of_two_ranks_leaves_its_exports_and_another_start_makes_what_is_missing(tmp_path):
    run, path = tmp_path / "run", tmp_path / "config.json"
    path.write_text(json.dumps(settings_of(tmp_path)))
    # Exports have the lowest priority, and the run waits for its last one.
    first = launched(path, "--ranks", 2, timeout=900)
    assert first.code == 0, first.err
    assert records(run) == [(4, "exported"), (6, "exported")]
    assert [one.name for one in (run / "checkpoints").glob("step-*")] == ["step-00000006"]
    shutil.rmtree(run / "hf" / "step-00000006")
    assert launched(path, "--ranks", 2, timeout=900).code == 0
    assert records(run)[2:] == [(6, "exported")]
    for step in (4, 6):
        card = (run / "hf" / f"step-{step:08d}" / "README.md").read_text()
        assert f"step {step}" in card and "tensors equal to the bit" in card


# ---- by itself


@pytest.fixture
def export(tmp_path, monkeypatch):
    """Makes the exporter of a run in `tmp_path/run`, whose process is a script; all are ended with the test."""
    made: list[BackgroundExport] = []
    monkeypatch.setattr(background_export, "_LOOK_SECONDS", 0.01)

    def make(
        script: str = COPY, every: int = 2, begin: int = 0, last: int = 100, nice: int = 0, **options: Any
    ) -> Any:
        # Beside other tests a process of the lowest priority may wait for a minute.
        monkeypatch.setattr(background_process, "NICE", nice)
        monkeypatch.setattr(
            ExportJob, "command", lambda self, config: ["sh", "-c", script, str(self.source), str(self.out)]
        )
        config = tiny.tiny_config(tmp_path, checkpoint={"every_steps": 1, "export_hf": {"every": every}})
        exporter = BackgroundExport(config, RunDirectory(tmp_path / "run"), last, **options)
        made.append(exporter)
        exporter.begin(begin)
        return exporter

    yield make
    for exporter in made:
        exporter.close()


def save(run: Path, step: int, content: str = "weights") -> Path:
    temporary = checkpoint_files.begin(run / "checkpoints", step)
    (temporary / "state" / "a").write_text(content)
    description = {"step": step, "consumed_samples": step, "model": {}}
    folder = checkpoint_files.step_folder(run / "checkpoints", step)
    return checkpoint_files.commit(temporary, folder, description).folder


def go(run: Path, *steps: int) -> None:
    (run / "hf").mkdir(exist_ok=True)
    for step in steps:
        (run / "hf" / f"step-{step:08d}.go").touch()


def exported(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "hf").iterdir() if path.is_dir())


def process_of(exporter: Any) -> psutil.Process:
    return psutil.Process(until(lambda: exporter._process).pid)


def test_a_checkpoint_may_be_pruned_while_it_is_read(tmp_path, export):
    run = tmp_path / "run"
    exporter = export(WHEN_TOLD)
    folder = save(run, 2)
    exporter.saved(2)
    checkpoint_files.remove(folder)
    go(run, 2)
    said: list[str] = []
    exporter.finish(said.append)
    assert (run / "hf" / "step-00000002" / "a").read_text() == "weights"
    assert records(run) == [(2, "exported")] and not list((run / "checkpoints").glob(".*"))
    assert said[0].startswith("Waiting for the export of step 2.") and "Step 2 is exported:" in said[-1]


def test_what_is_not_due_and_what_others_do_is_not_exported(tmp_path, export):
    exporter, other = export(every=4, last=7), export(is_main=False)
    for step in (1, 2, 4, 7):
        save(tmp_path / "run", step)
        for one in (exporter, other):
            one.saved(step)
    exporter.finish(print)
    other.finish(print)
    assert exported(tmp_path / "run") == ["step-00000004", "step-00000007"]


def test_it_is_of_the_lowest_priority_and_no_rank(tmp_path, export, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    exporter = export(WHEN_TOLD, nice=background_process.NICE)
    save(tmp_path / "run", 2)
    exporter.saved(2)
    process = process_of(exporter)
    until(lambda: process.nice() == 19 and "sh" in process.name())
    environment = until(process.environ)
    assert process.ionice().ioclass == psutil.IOPRIO_CLASS_IDLE
    assert "RANK" not in environment and environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["OMP_NUM_THREADS"] == "1" and os.getsid(process.pid) == process.pid
    autogroup = Path(f"/proc/{process.pid}/autogroup")
    assert not autogroup.exists() or autogroup.read_text().split()[-1] in ("19", "")


def test_of_those_that_wait_the_newest_comes_first_and_what_is_pruned_is_said(tmp_path, export):
    run = tmp_path / "run"
    exporter = export(WHEN_TOLD)
    folders = {}
    said: list[str] = []
    for step in (2, 4, 6, 8):
        folders[step] = save(run, step)
        exporter.saved(step)
        until(lambda: exporter._process)
    links = sorted(path.name for path in (run / "checkpoints").glob(".*.export"))
    assert links == [".step-00000002.export", ".step-00000008.export"], "one at work, one that waits"
    checkpoint_files.remove(folders[4])
    go(run, 2, 4, 6, 8)
    until(lambda: len(records(run)) == 4)
    assert records(run) == [(2, "exported"), (8, "exported"), (6, "exported"), (4, "export_skipped")]
    exporter.finish(said.append)
    assert "Warning: export_skipped: step 4" in said[-1] and f"davinci convert to-hf {run}@4" in said[-1]


def test_at_the_end_of_the_run_all_are_made_up_for_that_can_be(tmp_path, export):
    run = tmp_path / "run"
    exporter = export(WHEN_TOLD)
    for step in (2, 4, 6):
        save(run, step)
        exporter.saved(step)
        until(lambda: exporter._process)
    go(run, 2, 4, 6)
    said: list[str] = []
    exporter.finish(said.append)
    assert records(run) == [(2, "exported"), (6, "exported"), (4, "exported")]


def test_a_run_that_ends_ends_it_and_the_next_start_goes_on(tmp_path, export):
    run = tmp_path / "run"
    exporter = export(WHEN_TOLD)
    folder = save(run, 2)
    exporter.saved(2)
    process = process_of(exporter)
    with pytest.raises(KeyError), exporter:
        raise KeyError
    assert not process.is_running()
    assert records(run) == [(2, "export_interrupted")]
    checkpoint_files.remove(folder)
    again = export(begin=3)
    until(lambda: (2, "exported") in records(run))
    assert again.told()[0].startswith("Exports of earlier steps that are missing: 2.")
    assert not list((run / "checkpoints").glob(".*"))


def test_a_start_makes_what_is_due_and_missing_and_nothing_of_a_past_that_was_left(tmp_path, export):
    run = tmp_path / "run"
    for step in (2, 3, 4, 6):
        save(run, step)
    ExportJob(run, 6).link()
    shutil.copytree(run / "checkpoints" / "step-00000004", run / "hf" / "step-00000004")
    exporter = export(begin=5)
    until(lambda: records(run))
    exporter.finish(print)
    assert records(run) == [(2, "exported")]
    assert not ExportJob(run, 6).links.exists()


def test_one_that_an_earlier_start_has_left_at_work_is_waited_for(tmp_path, export):
    run = tmp_path / "run"
    (run / "hf").mkdir(parents=True)
    held = try_lock(run / "hf" / ".exporting")
    assert held is not None
    exporter = export()
    save(run, 2)
    exporter.saved(2)
    until(lambda: exporter._at_work)
    assert exporter._process is None and exported(run) == []
    os.close(held)
    exporter.finish(print)
    assert records(run) == [(2, "exported")]


def test_a_step_that_is_taken_again_is_exported_again(tmp_path, export):
    run = tmp_path / "run"
    earlier = run / "hf" / "step-00000002"
    earlier.mkdir(parents=True)
    (earlier / "training_manifest.json").write_text('{"checkpoint": {"sha256": "another"}}')
    exporter = export(WHEN_TOLD)
    save(run, 2, "first")
    exporter.saved(2)
    process_of(exporter)
    (aside,) = (run / "hf").glob("step-00000002.replaced-*")
    assert (aside / "training_manifest.json").exists()
    save(run, 2, "second")
    exporter.saved(2)
    go(run, 2)
    until(lambda: (2, "exported") in records(run))
    assert records(run) == [(2, "export_interrupted"), (2, "exported")]
    assert (earlier / "a").read_text() == "second"


def test_a_save_that_fails_is_given_the_space_of_exports(tmp_path, export):
    run = tmp_path / "run"
    exporter = export('mkdir "$(dirname "$1")/.$(basename "$1").partial"; ' + WHEN_TOLD)
    for step in (2, 4):
        save(run, step)
        exporter.saved(step)
        process = process_of(exporter)
    until(lambda: list((run / "hf").glob(".*.partial")))
    exporter.save_failed()
    until(lambda: records(run) and exporter._at_work is None)
    assert not process.is_running() and not list(run.glob("hf/.*.partial"))
    assert not list((run / "checkpoints").glob(".*.export"))
    go(run, 2, 4)
    exporter.saved(5)
    until(lambda: len(records(run)) == 3)
    assert records(run) == [(2, "export_interrupted"), (4, "exported"), (2, "exported")]


def test_without_space_there_is_no_export(tmp_path, export, monkeypatch):
    monkeypatch.setattr(background_export, "free_bytes", lambda path: 1000)
    exporter = export()
    save(tmp_path / "run", 2)
    exporter.saved(2)
    exporter.finish(print)
    assert records(tmp_path / "run") == [(2, "export_skipped")]


def test_a_checkpoint_that_is_gone_or_damaged_is_said_and_the_next_one_is_tried(tmp_path, export):
    run = tmp_path / "run"
    run.mkdir()
    exporter = export()
    exporter.saved(2)
    (save(run, 4) / "state" / "a").unlink()
    exporter.saved(4)
    until(lambda: len(records(run)) == 2)
    save(run, 6)
    exporter.saved(6)
    exporter.finish(print)
    assert records(run) == [(2, "export_failed"), (4, "export_failed"), (6, "exported")]
    said = exporter.told()
    assert said == [] and exported(run) == ["step-00000006"]


def test_where_there_are_no_hard_links_the_checkpoint_is_read_where_it_is(tmp_path, export, monkeypatch):
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    exporter = export()
    save(tmp_path / "run", 2)
    exporter.saved(2)
    exporter.finish(print)
    assert records(tmp_path / "run") == [(2, "exported")]


def test_a_signal_while_the_end_waits_leaves_it_to_the_next_start(tmp_path, export, monkeypatch):
    exporter = export(WHEN_TOLD)
    save(tmp_path / "run", 2)
    exporter.saved(2)
    process = process_of(exporter)
    monkeypatch.setattr(WATCH, "_late", int(signal.SIGTERM))
    with pytest.raises(Stopped, match="SIGTERM was heard while the last exports were being made") as ended:
        exporter.finish(print)
    assert ended.value.code == 75 and not process.is_running()
    assert f"davinci convert to-hf {tmp_path / 'run'}@2" in str(ended.value)


def test_a_signal_while_the_last_step_is_saved_is_one_to_what_waits_behind_it():
    watch = SignalWatch()
    watch.begin(100.0)
    watch._hear(signal.SIGTERM)
    assert watch.late == 0, "a step boundary may come"
    watch.end()
    assert watch.late == signal.SIGTERM
    watch._hear(signal.SIGINT)
    assert watch.late == signal.SIGTERM


# ---- what is refused before a run begins


def test_only_what_is_saved_can_be_exported():
    for every_steps in (2, None):
        with pytest.raises(ValueError, match=r"export_hf\.every \(5\) is not a multiple of every_steps"):
            CheckpointConfig.model_validate({"every_steps": every_steps, "export_hf": {"every": 5}})
    CheckpointConfig.model_validate({"every_steps": None, "export_hf": {}})


def test_a_model_that_no_family_can_hold_is_refused_by_plan_and_train(tmp_path, monkeypatch):
    config = tiny.tiny_config(tmp_path, checkpoint={"export_hf": {}}, model={"family": "qwen3"})
    with pytest.raises(ConfigError, match=r"model\.qk_norm: False, not True"):
        export_check.check_export(config)
    monkeypatch.setattr(export_check.importlib.util, "find_spec", lambda name: None)
    config = tiny.tiny_config(tmp_path, checkpoint={"export_hf": {}})
    with pytest.raises(EnvironmentProblem, match="verify=false"):
        export_check.check_export(config)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny.tiny_settings(tmp_path)))
    override = 'model.experts={"number": 4, "top_k": 2}'
    for command in ("plan", "train"):
        text = davinci(command, path, "checkpoint.export_hf={}", override).refusal()
        assert "model.experts: 4 in each layer" in text and "checkpoint.export_hf" in text
    assert not (tmp_path / "run").exists()
