"""A run with transforms sees the same samples whoever reads them, on every layout, and after a kill."""

from __future__ import annotations

import json
import os
import signal
import time

import numpy as np
import pytest

from megatron_davinci.config import validate
from megatron_davinci.data import Curriculum, Journal
from megatron_davinci.errors import DataError
from megatron_davinci.train.planned import open_sources
from tests.ranks import run_ranks, start_ranks
from tests.tiny import train_here
from tests.transforming import FILLING, FIRST_CHANGED, TRANSFORMS, by_hand, transformed_settings

ALL = {**TRANSFORMS, "document_mask": True}
STEPS = 10  # two plain ones, then eight that are transformed


def train_watched(settings, folder):
    """Train, and keep what the model is given of each sample, by its number, for each rank and step."""
    import torch.distributed as dist

    from megatron_davinci.train.feed import Feed

    take = Feed.take

    def watched(self, first_sample, batch, stage):
        samples = take(self, first_sample, batch, stage)
        if samples.tokens is not None:
            tokens, mask = samples.tokens.numpy(), samples.loss_mask
            weights = np.ones_like(tokens[:, 1:]) if mask is None else mask.numpy()
            path = folder / f"{dist.get_rank()}-{first_sample}"
            np.savez(path, ns=self.numbers(first_sample, batch), tokens=tokens, weights=weights)
        return samples

    Feed.take = watched
    try:
        return train_here(settings)
    finally:
        Feed.take = take


def settings_of(root, directory, transforms=None, loader=None, **parallel):
    settings = transformed_settings(
        root,
        ALL if transforms is None else transforms,
        run={"directory": str(directory / "run"), "seed": 7},
        parallel={"device": "cpu", **parallel},
        checkpoint={"every_steps": 3},
    )
    settings["data"]["loader"] = loader or {}
    (directory / "seen").mkdir(parents=True, exist_ok=True)
    return settings


def trained(root, directory, ranks=1, **changes):
    run_ranks(ranks, train_watched, settings_of(root, directory, **changes), directory / "seen")
    return metrics(directory), seen(directory)


def steps_on_record(directory):
    """Lines of the steps so far; the last may be half-written."""
    path = directory / "run" / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def metrics(directory):
    return [json.loads(line) for line in steps_on_record(directory)]


def seen(directory):
    """The tokens and weights that the model was given of each sample; every rank that had it had the same."""
    found = {}
    for path in (directory / "seen").iterdir():
        with np.load(path) as rows:
            for n, tokens, weights in zip(*(rows[name] for name in ("ns", "tokens", "weights")), strict=True):
                sample = tokens.tolist(), weights.tolist()
                assert found.setdefault(int(n), sample) == sample
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("transforms")
    transformed_settings(root)
    return root


@pytest.fixture(scope="module")
def whole(root):
    return trained(root, root / "whole")


def measured(lines):
    return [
        (line["step"], line["loss"], line["grad_norm"], line.get("transform_tokens_cut")) for line in lines
    ]


def test_the_model_is_given_the_samples_built_by_hand(root, whole):
    lines, samples = whole
    config = validate(settings_of(root, root / "whole"), where="test")
    sources = open_sources(config)
    records = Journal.open(root / "whole" / "run" / "journal.jsonl").mixes
    curriculum = Curriculum({name: s.num_windows for name, s in sources.items()}, 7, records)
    assert sorted(samples) == list(range(STEPS * 8))
    cuts = []
    for n, (tokens, weights) in sorted(samples.items()):
        wanted = by_hand(sources, curriculum, n, ALL if n >= FIRST_CHANGED else {}, 7)
        assert (tokens, weights) == wanted[:2]
        cuts.append(wanted[2])
    by_step = np.array(cuts).reshape(STEPS, 8).sum(axis=1).tolist()
    assert [line.get("transform_tokens_cut") for line in lines] == [None, None, *by_step[2:]]
    assert min(by_step[2:]) > 0
    assert [record.transforms != {} for record in records] == [False, True]


@pytest.mark.long
def test_a_pipeline_rank_that_looks_at_no_tokens_counts_with_the_others(root, whole, tmp_path):
    settings = settings_of(root, tmp_path, TRANSFORMS, pipeline=3)
    settings["model"]["num_layers"] = 3
    run_ranks(3, train_watched, settings, tmp_path / "seen")
    assert {path.name.split("-")[0] for path in (tmp_path / "seen").iterdir()} == {"0", "2"}
    assert seen(tmp_path) == whole[1]
    assert [line[3] for line in measured(metrics(tmp_path))] == [line[3] for line in measured(whole[0])]


@pytest.mark.long
@pytest.mark.needs("dali")
def test_from_dali_too(root, whole, tmp_path):
    settings = settings_of(root, tmp_path, loader={"kind": "dali", "workers": 1})
    run_ranks(1, train_watched, settings, tmp_path / "seen", parents=True)
    assert seen(tmp_path) == whole[1]
    assert measured(metrics(tmp_path)) == measured(whole[0])


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param({}, id="DP2"),
        pytest.param({"context": 2}, id="CP2", marks=pytest.mark.long),
        # Tensor-parallel ranks read as one does; PP3 is above.
        pytest.param({"tensor": 2, "sequence": True}, id="TP2+SP", marks=pytest.mark.long),
        pytest.param({"pipeline": 2}, id="PP2", marks=pytest.mark.long),
    ],
)
def test_every_layout_is_given_the_same(parallel, root, whole, tmp_path):
    lines, samples = trained(root, tmp_path, ranks=2, **parallel)
    assert samples == whole[1]
    for ours, theirs in zip(measured(lines), measured(whole[0]), strict=True):
        assert ours[0] == theirs[0] and ours[3] == theirs[3]
        assert ours[1] == pytest.approx(theirs[1], rel=1e-5)
        assert ours[2] == pytest.approx(theirs[2], rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("prefetch_steps", [1, 3])
def test_whoever_reads_and_however_far_ahead_it_is_the_same_run(prefetch_steps, root, whole, tmp_path):
    loader = {"workers": 2 if prefetch_steps == 3 else 0, "prefetch_steps": prefetch_steps}
    lines, samples = trained(root, tmp_path, loader=loader)
    assert samples == whole[1]
    assert measured(lines) == measured(whole[0])


def test_a_killed_run_goes_on_with_the_same_samples(root, whole, tmp_path):
    settings = settings_of(root, tmp_path)
    started = start_ranks(1, train_watched, settings, tmp_path / "seen")
    try:
        deadline = time.monotonic() + 120
        while len(steps_on_record(tmp_path)) < 5:
            assert time.monotonic() < deadline, "the run never came that far"
            assert all(process.is_alive() for process, _ in started), "the run ended before it was killed"
            time.sleep(0.005)
    finally:
        for process, connection in started:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            connection.close()
    for path in (tmp_path / "seen").iterdir():
        path.unlink()
    lines, samples = trained(root, tmp_path)
    begun = json.loads((tmp_path / "run" / "manifest.json").read_text())["starts"][-1]["step"]
    assert begun in (3, 6, 9) and sorted(samples) == list(range(8 * begun, STEPS * 8))
    assert samples == {n: sample for n, sample in whole[1].items() if n >= 8 * begun}
    assert measured(lines) == measured(whole[0])


def test_what_was_done_to_samples_is_not_changed_under_a_run(root, tmp_path):
    settings = settings_of(root, tmp_path)
    run_ranks(1, train_here, {**settings, "train": {**settings["train"], "stop_after_steps": 4}})
    changes = {"fill_in_the_middle": {**FILLING, "rate": 0.5}}
    with pytest.raises(DataError, match="its transforms cannot change"):
        run_ranks(1, train_here, settings_of(root, tmp_path, {**ALL, **changes}))
    # Nor the text that stands before documents.
    settings["data"]["sources"]["web"] = {**settings["data"]["sources"]["web"], "metadata": "other"}
    with pytest.raises(DataError, match="its transforms cannot change"):
        run_ranks(1, train_here, settings)


def test_what_a_controller_brings_in_is_transformed_from_its_first_sample_on(root, tmp_path):
    transforms = {"metadata_prefix": {"fraction": 1.0}}
    settings = settings_of(root, tmp_path, transforms)
    settings["curriculum"][1]["mixture"] = {"qa": 0.5, "web": 0.5}
    settings["evaluation"] = {"every_steps": 4, "sequences": 4}
    settings["data"]["validation"] = {name: str(root / "data" / name) for name in ("code", "qa", "web")}
    settings["controller"] = {
        "mode": "apply",
        "policy": "loss_weighted",
        "maximum_change": 0.4,
        "loss_weighted": {"reference": dict.fromkeys(("code", "qa", "web"), 9.0), "smoothing": 0.99},
    }
    run_ranks(1, train_watched, settings, tmp_path / "seen")
    sources = open_sources(validate(settings, where="test"))
    records = Journal.open(tmp_path / "run" / "journal.jsonl").mixes
    begins, came = [(mix.first_sample, mix.transforms) for mix in records if mix.stage == "changed"][:2]
    curriculum = Curriculum({name: s.num_windows for name, s in sources.items()}, 7, records)
    numbers = [n for n in range(came[0], STEPS * 8) if curriculum.locate(n).source == "code"]
    samples = seen(tmp_path)
    assert len(numbers) > 8
    for n in numbers:
        assert samples[n] == by_hand(sources, curriculum, n, transforms, 7)[:2]
    assert set(begins[1]["metadata_prefix"]["metadata"]) == {"web"}
    assert set(came[1]["metadata_prefix"]["metadata"]) == {"code", "web"}
