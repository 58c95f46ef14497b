"""A run that DALI feeds is bitwise the run that threads feed, also when it stops and goes on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megatron_davinci.data.dali import DevicePieces
from megatron_davinci.platform.device import choose
from megatron_davinci.train.dali_feed import rows_of
from tests.ranks import run_ranks
from tests.tiny import tiny_settings, train_here

DALI = {"kind": "dali", "workers": 1}


def numbers(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(m["step"], m["consumed_samples"], m["loss"], m["grad_norm"]) for m in lines]


def settings_of(root, name, loader, **train):
    settings = tiny_settings(root, run={"directory": str(root / name), "seed": 7}, train=train)
    settings["data"]["loader"] = loader
    return settings


@pytest.mark.long
@pytest.mark.needs("dali")
def test_stopped_and_resumed_over_a_stages_end_on_two_ranks(tmp_path):
    run_ranks(2, train_here, settings_of(tmp_path, "native", {}, stop_after_steps=33))
    # The first stage ends at step 30, and its batch doubles after step 12.
    run_ranks(2, train_here, settings_of(tmp_path, "dali", DALI, stop_after_steps=17), parents=True)
    assert numbers(tmp_path / "dali") == numbers(tmp_path / "native")[:17]
    run_ranks(2, train_here, settings_of(tmp_path, "dali", DALI, stop_after_steps=33), parents=True)
    assert numbers(tmp_path / "dali") == numbers(tmp_path / "native")


def test_micro_batches_on_the_device_are_rows_of_their_own_memory():
    pieces = [np.arange(6, dtype=np.uint16).reshape(2, 3), np.full((2, 3), 7, np.uint16)]
    rows = rows_of(DevicePieces(tuple(pieces)), choose("cpu", threads=1))
    pieces[0][:] = 0
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[0, 1, 2], [3, 4, 5], [7, 7, 7], [7, 7, 7]]


@pytest.mark.gpu
@pytest.mark.needs("dali")
def test_on_a_gpu_too(tmp_path):
    from megatron_davinci.data import Batches, Curriculum, MixRecord, Source
    from megatron_davinci.data.dali import DaliLoader
    from tests.tiny import LENGTH, write_source

    source = Source.open("a", write_source(tmp_path / "a", "a", 0), LENGTH)
    curriculum = Curriculum({"a": source.num_windows}, 7, [MixRecord(0, "only", {"a": "1"})])
    batches, platform = Batches(curriculum, {"a": source}), choose("cuda")
    loader = DaliLoader(batches, micro_batch_size=2, data_ranks=2, workers=1, prefetch_steps=2, device=0)
    for ns in ([0, 1, 4, 5], [8, 9, 12, 13], [1000, 1001, 1005, 1009]):
        taken = loader.take(np.array(ns))
        rows = rows_of(taken.tokens, platform)
        assert rows.is_cuda and np.array_equal(rows.cpu().numpy(), batches.read(np.array(ns)).tokens)
    loader.close()
