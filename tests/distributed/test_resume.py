"""A run that was killed and started again is the run that would have been."""

import json
import os
import shutil
import signal
import time

import pytest

from megatron_davinci.data import Journal, MixRecord
from megatron_davinci.errors import CheckpointError, DataError, DavinciError
from tests.ranks import run_ranks, start_ranks
from tests.tiny import LENGTH, train_here
from tests.tiny import tiny_settings as settings_of_fifty_steps

# Two layers in four chunks: the first rank has the embedding and layer 2, the last layer 1 and the output.
INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": [0, 1, 1, 0]}


STEPS = 36


def tiny_settings(root, **changes):
    """A run that ends six steps into its second stage."""
    settings = settings_of_fifty_steps(root, **changes)
    settings["curriculum"][1]["tokens"] = 6 * 8 * LENGTH
    return settings


def metrics(run):
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def numbers(run):
    return [
        (m["step"], m["consumed_samples"], m["loss"], m["grad_norm"], m["learning_rate"])
        for m in metrics(run)
    ]


def kill_after(step, ranks, settings, run):
    """Start ranks and SIGKILL them all once `step` is on record."""
    started = start_ranks(ranks, train_here, settings)
    try:
        deadline = time.monotonic() + 120
        while len(metrics_or_torn(run)) < step:
            assert time.monotonic() < deadline, "the run never came that far"
            assert all(process.is_alive() for process, _ in started), "the run ended before it was killed"
            time.sleep(0.01)
    finally:
        for process, _ in started:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        for process, connection in started:
            process.join()
            connection.close()


def metrics_or_torn(run):
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    run_ranks(2, train_here, tiny_settings(root))
    return root, numbers(root / "run")


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param({}, id="DP2"),
        pytest.param({"tensor": 2, "sequence": True}, id="TP2+SP"),
        pytest.param({"pipeline": 2}, id="PP2"),
    ],
)
@pytest.mark.long  # tests/faults/test_kills.py kills more
def test_kill_9_in_the_middle_and_resume_is_bitwise_the_same_run(parallel, undisturbed, tmp_path):
    root, _ = undisturbed
    whole = tiny_settings(
        root, parallel={"device": "cpu", **parallel}, run={"directory": str(tmp_path / "whole"), "seed": 7}
    )
    run_ranks(2, train_here, whole)
    killed = {
        **whole,
        "run": {"directory": str(tmp_path / "killed"), "seed": 7},
        "checkpoint": {"every_steps": 10},
    }
    kill_after(24, 2, killed, tmp_path / "killed")
    at = [m["step"] for m in metrics(tmp_path / "killed")][-1]
    assert 24 <= at < STEPS
    run_ranks(2, train_here, killed)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    starts = json.loads((tmp_path / "killed" / "manifest.json").read_text())["starts"]
    assert starts[0]["step"] == 0 and starts[1]["step"] in (20, 30)
    assert (tmp_path / "killed" / "journal.jsonl").read_text() == (
        tmp_path / "whole" / "journal.jsonl"
    ).read_text()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((2, {"tensor": 2}), (1, {}), id="TP2 to TP1", marks=pytest.mark.long),
        pytest.param((1, {}), (2, {}), id="DP1 to DP2", marks=pytest.mark.long),
        pytest.param((4, {"tensor": 2, "pipeline": 2}), (2, {}), id="TP2xPP2 to DP2", marks=pytest.mark.long),
        pytest.param((2, INTERLEAVED), (1, {}), id="interleaved to one rank"),
        pytest.param(
            (2, {"pipeline": 2, "pipeline_layers": [0, 2]}),
            (2, INTERLEAVED),
            id="uneven to interleaved",
            marks=pytest.mark.long,
        ),
    ],
)
def test_resume_on_another_layout(before, after, undisturbed, tmp_path):
    root, expected = undisturbed
    run = {"directory": str(tmp_path / "run"), "seed": 7}
    ranks, parallel = before
    first = tiny_settings(root, run=run, parallel={"device": "cpu", **parallel})
    first["train"] = {**first["train"], "stop_after_steps": 23}
    assert run_ranks(ranks, train_here, first)[0] == 23
    ranks, parallel = after
    run_ranks(ranks, train_here, tiny_settings(root, run=run, parallel={"device": "cpu", **parallel}))
    found = numbers(tmp_path / "run")
    assert [f[:2] for f in found] == [e[:2] for e in expected]
    assert max(abs(f[2] - e[2]) / e[2] for f, e in zip(found, expected, strict=True)) <= 1e-5


@pytest.mark.long
def test_experts_go_on_with_more_and_with_fewer_ranks_for_them(tmp_path):
    # Weights and optimizer: with one expert-parallel rank, with two, with two that split the rest too, with one.
    settings = tiny_settings(tmp_path)
    settings["model"] |= {"ffn_hidden_size": 32, "experts": {"number": 4, "router_z_loss": 0.01}}

    def train(ranks, directory, until, **parallel):
        changed = {**settings, "run": {"directory": str(tmp_path / directory), "seed": 7}}
        changed["parallel"] = {"device": "cpu", **parallel}
        changed["train"] = {**settings["train"], "stop_after_steps": until}
        assert run_ranks(ranks, train_here, changed)[0] == until

    train(1, "whole", 24)
    train(1, "parts", 6)
    train(2, "parts", 12, expert=2)
    train(2, "parts", 18, expert=2, tensor=2, sequence=True)
    train(1, "parts", 24)
    whole, parts = numbers(tmp_path / "whole"), numbers(tmp_path / "parts")
    assert max(abs(a[2] - b[2]) / b[2] for a, b in zip(parts, whole, strict=True)) <= 1e-5
    assert max(abs(a[3] - b[3]) / b[3] for a, b in zip(parts, whole, strict=True)) <= 1e-4


@pytest.mark.long  # what tests/faults/test_kills.py kills has dropout
def test_dropout_is_a_function_of_the_clock(undisturbed, tmp_path):
    root, without = undisturbed
    model = {**tiny_settings(root)["model"], "dropout": 0.1}
    whole = tiny_settings(root, run={"directory": str(tmp_path / "whole"), "seed": 7}, model=model)
    run_ranks(2, train_here, whole)
    parts = {**whole, "run": {"directory": str(tmp_path / "parts"), "seed": 7}}
    run_ranks(2, train_here, {**parts, "train": {**parts["train"], "stop_after_steps": 17}})
    run_ranks(2, train_here, parts)
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    assert numbers(tmp_path / "whole") != without


@pytest.fixture(scope="module")
def stopped_once(undisturbed, tmp_path_factory):
    root, _ = undisturbed
    run = tmp_path_factory.mktemp("stopped") / "run"
    settings = tiny_settings(root, run={"directory": str(run), "seed": 7}, checkpoint={"every_steps": 8})
    run_ranks(1, train_here, until(settings, 16))
    return settings, run, shutil.copytree(run, run.with_name("as it was"))


@pytest.fixture
def stopped(stopped_once):
    """A run of one rank that stopped after step 16 with checkpoints of steps 8 and 16."""
    settings, run, as_it_was = stopped_once
    shutil.rmtree(run)
    shutil.copytree(as_it_was, run)
    return settings, run


def until(settings, step):
    return {**settings, "train": {**settings["train"], "stop_after_steps": step}}


def assert_goes_as(expected, run, last):
    found = numbers(run)
    assert len(found) == last
    assert max(abs(f[2] - e[2]) / e[2] for f, e in zip(found, expected[:last], strict=True)) <= 1e-5


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(stopped, undisturbed):
    settings, run = stopped
    shard = next((run / "checkpoints" / "step-00000016" / "state").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    run_ranks(1, train_here, until(settings, 20))
    starts = json.loads((run / "manifest.json").read_text())["starts"]
    assert [s["step"] for s in starts] == [0, 8]
    assert_goes_as(undisturbed[1], run, 20)


def test_when_no_checkpoint_is_whole_nothing_is_begun_anew(stopped):
    settings, run = stopped
    for shard in (run / "checkpoints").glob("step-*/state/*.distcp"):
        shard.write_bytes(shard.read_bytes()[:-1])
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match="none of them is whole"):
        run_ranks(1, train_here, settings)
    assert (run / "metrics.jsonl").read_text() == before


def test_the_order_of_sources_in_the_file_decides_nothing(stopped, undisturbed):
    settings, run = stopped
    sources = dict(reversed(settings["data"]["sources"].items()))
    settings = {**settings, "data": {**settings["data"], "sources": sources}}
    run_ranks(1, train_here, until(settings, 24))
    assert_goes_as(undisturbed[1], run, 24)


def train_with_a_bad_gradient(settings):
    """Train; at step 12, and when it is taken again, an element of the gradient is no number; the loss is fine."""
    from megatron_davinci.train.step import Stepper

    run, steps = Stepper._run, []

    def bad_run(self, tokens, micro_batches, size, *, forward_only):
        answer = run(self, tokens, micro_batches, size, forward_only=forward_only)
        steps.append(forward_only)
        if steps.count(False) >= 12 and not forward_only:
            next(iter(self.wrapped[0].module.parameters())).main_grad.view(-1)[3] = float("nan")
        return answer

    Stepper._run = bad_run
    return train_here(settings)


def test_a_gradient_that_is_not_finite_is_never_applied(undisturbed, tmp_path):
    root, expected = undisturbed
    settings = tiny_settings(
        root, run={"directory": str(tmp_path / "run"), "seed": 7}, checkpoint={"every_steps": 4, "keep": 1}
    )
    with pytest.raises(DavinciError) as error:
        run_ranks(1, train_with_a_bad_gradient, {**settings, "health": {"not_finite": "stop"}})
    assert "gradient norm" in str(error.value) and "step 12" in str(error.value)
    run_ranks(1, train_here, until(settings, 16))
    assert_goes_as(expected, tmp_path / "run", 16)


def test_a_checkpoint_of_another_model_is_refused(stopped):
    settings, _ = stopped
    other = {**settings, "model": {**settings["model"], "num_layers": 1, "tie_embeddings": False}}
    with pytest.raises(CheckpointError) as error:
        run_ranks(1, train_here, other)
    assert "model.num_layers: 2 in the checkpoint, 1 in this run" in str(error.value)
    assert "model.tie_embeddings: True" in str(error.value)


def test_data_that_changed_under_a_run_is_refused(stopped, tmp_path):
    settings, run = stopped
    before = (run / "metrics.jsonl").read_text()
    sources = {**settings["data"]["sources"], "b": settings["data"]["sources"]["a"]}
    with pytest.raises(DataError, match="source b: other content than on record"):
        run_ranks(1, train_here, {**settings, "data": {**settings["data"], "sources": sources}})
    assert (run / "metrics.jsonl").read_text() == before


def test_an_edited_configuration_changes_what_lies_ahead_and_nothing_else(stopped):
    settings, run = stopped
    first, second = settings["curriculum"]
    before = (run / "journal.jsonl").read_text(), (run / "metrics.jsonl").read_text()
    rewritten = {**settings, "curriculum": [{**first, "global_batch_size": 4}, second]}
    with pytest.raises(DataError, match="its past is sealed"):
        run_ranks(1, train_here, rewritten)
    assert ((run / "journal.jsonl").read_text(), (run / "metrics.jsonl").read_text()) == before
    ahead = [{**first, "mixture": {"a": 0.25, "b": 0.75}}, {**second, "mixture": {"a": 0.5, "b": 0.5}}]
    run_ranks(1, train_here, until({**settings, "curriculum": ahead}, 32))
    records = Journal.open(run / "journal.jsonl").mixes
    assert [(r.first_sample, r.weights["a"], r.origin) for r in records] == [
        (0, "0.75", ""),
        (80, "0.25", "configuration"),
        (192, "0.5", ""),
    ]


def test_a_finished_run_has_nothing_left_to_do(undisturbed):
    root, expected = undisturbed
    manifest = root / "run" / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json"
    before = manifest.read_text()
    assert run_ranks(2, train_here, tiny_settings(root)) == [STEPS, STEPS]
    assert numbers(root / "run") == expected
    assert manifest.read_text() == before


@pytest.mark.long
def test_a_mixture_that_the_journal_has_beyond_the_stages_is_replayed(undisturbed, tmp_path):
    root, _ = undisturbed
    run = {"directory": str(tmp_path / "run")}
    run_ranks(1, train_here, tiny_settings(root, run=run, train={"stop_after_steps": 5}))
    Journal.open(tmp_path / "run" / "journal.jsonl").append(MixRecord(48, "first", {"a": "0", "b": "1"}))
    run_ranks(2, train_here, tiny_settings(root, run=run, train={"stop_after_steps": 16}))
    changed = numbers(tmp_path / "run")
    run = {"directory": str(tmp_path / "plain")}
    run_ranks(2, train_here, tiny_settings(root, run=run, train={"stop_after_steps": 16}))
    plain = numbers(tmp_path / "plain")
    losses = [[loss for _, _, loss, *_ in lines] for lines in (changed, plain)]
    # Steps 1 to 12 hold samples 0 to 47, and the new mixture only `b` from sample 48 on.
    assert losses[0][:12] == pytest.approx(losses[1][:12], rel=1e-4)
    assert losses[0][12:] != pytest.approx(losses[1][12:], rel=1e-4)
    records = Journal.open(tmp_path / "run" / "journal.jsonl").mixes
    assert [record.first_sample for record in records] == [0, 48]
