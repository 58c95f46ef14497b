"""Labels that carry no loss: left out of the loss and its gradient, in every layout, and counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_davinci.data import IndexedDatasetWriter, Manifest, Shard, Source
from megatron_davinci.evaluate.heldout import choose_windows
from tests.ranks import run_ranks
from tests.tiny import VOCABULARY, tiny_config, tiny_settings, train_here

LAYOUTS = {"DP2": (2, {}), "TP2+SP": (2, {"tensor": 2, "sequence": True}), "PP2": (2, {"pipeline": 2})}


def write_masked(folder: Path, seed: int) -> None:
    """Documents that begin with a prompt of noise, which carries no loss, and go on with something learnable."""
    generator = np.random.default_rng(seed)
    with IndexedDatasetWriter(folder / "shard-00000", np.uint16, mask=True) as writer:
        for _ in range(60):
            prompt = generator.integers(0, VOCABULARY, size=int(generator.integers(20, 60)))
            answer = np.cumsum(generator.integers(1, 4, size=int(generator.integers(60, 100)))) % (
                VOCABULARY - 1
            )
            loss = np.repeat([0, 1], [len(prompt), len(answer)])
            writer.add_document(np.concatenate([prompt, answer]), loss=loss)
    Manifest(
        name=folder.name,
        domain=folder.name,
        dtype="uint16",
        vocab_size=VOCABULARY,
        eod_id=VOCABULARY - 1,
        tokenizer_sha256=None,
        shards=(Shard.of("shard-00000", writer.written),),
    ).save(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("masked")
    # One source has a mask and the other has none, so that batches mix both.
    tiny_settings(root)
    for file in (root / "data" / "a").iterdir():
        file.unlink()
    write_masked(root / "data" / "a", seed=5)
    return root


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_here(root: Path, directory: Path, ranks: int = 1, **parallel) -> list[dict]:
    settings = tiny_settings(
        root,
        parallel={"device": "cpu", **parallel},
        run={"directory": str(directory)},
        train={"stop_after_steps": 16},
        evaluation={"every_steps": 16},
    )
    run_ranks(ranks, train_here, settings)
    return lines(directory / "metrics.jsonl")


@pytest.fixture(scope="module")
def one_rank(root):
    return run_here(root, root / "run")


@pytest.mark.parametrize(
    "name", [name if name == "TP2+SP" else pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS]
)
def test_every_layout_computes_what_one_rank_computes(name, root, one_rank, tmp_path):
    ranks, parallel = LAYOUTS[name]
    found = run_here(root, tmp_path / "run", ranks, **parallel)
    for ours, theirs in zip(found, one_rank, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_without_its_masks_it_is_another_run(root, one_rank, tmp_path):
    shards = [path for path in (root / "data" / "a").iterdir() if path.name.startswith("shard")]
    bare = tmp_path / "data" / "a"
    bare.mkdir(parents=True)
    for path in shards:
        if path.suffix != ".mask":
            (bare / path.name).write_bytes(path.read_bytes())
    settings = tiny_settings(
        root,
        run={"directory": str(tmp_path / "run")},
        train={"stop_after_steps": 16},
        data={
            "sources": {"a": {"path": str(bare / "shard-00000")}, "b": {"path": str(root / "data" / "b")}},
            "validation": {"a": str(root / "data" / "a")},
        },
    )
    run_ranks(1, train_here, settings)
    unmasked = lines(tmp_path / "run" / "metrics.jsonl")
    # Noise cannot be learnt: where it carries loss, the mean stays higher.
    assert unmasked[-1]["loss"] > one_rank[-1]["loss"] + 0.1


def losses_of_disjoint_masks(root: str) -> list[tuple[float, float]]:
    """Sum of the loss and labels counted: with every label, with a random half, with the other half, with none."""
    import torch

    from megatron_davinci.model.build import build_model
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose
    from megatron_davinci.train.step import Stepper, wrap_model

    config, platform = tiny_config(Path(root)), choose("cpu", threads=1)
    distributed.start(platform, seed=1)
    stepper = Stepper(wrap_model(build_model(config, platform), config), None, config, platform)
    generator = torch.Generator().manual_seed(3)
    rows, length = 6, config.data.sequence_length
    tokens = torch.randint(0, VOCABULARY, (rows, length + 1), generator=generator)
    half = torch.randint(0, 2, (rows, length), generator=generator, dtype=torch.uint8)
    masks = [None, half, 1 - half, torch.zeros_like(half)]
    return [stepper.loss(tokens, 3, 2, mask) for mask in masks]


def test_the_losses_of_two_masks_that_complete_each_other_add_up(root):
    whole, half, rest, nothing = run_ranks(1, losses_of_disjoint_masks, str(root))[0]
    assert half[0] + rest[0] == pytest.approx(whole[0], rel=1e-5)
    assert half[1] + rest[1] == whole[1] == 6 * 32
    assert 0 < half[1] < whole[1]
    assert nothing == (0, 0)


def test_held_out_loss_counts_what_carries_loss(root, one_rank):
    settings = tiny_config(root)
    source = Source.open("a", root / "data" / "a", settings.data.sequence_length)
    chosen = choose_windows(source.num_windows, settings.evaluation.sequences, 1, "a")
    masks = np.empty((len(chosen), source.sequence_length), np.uint8)
    for row, window in zip(masks, chosen.tolist()):
        source.read_mask_into(window, row)
    measured = lines(root / "run" / "evals.jsonl")
    assert [record["heldout_tokens"]["a"] for record in measured] == [masks.sum()]
    assert 0 < masks.sum() < masks.size
