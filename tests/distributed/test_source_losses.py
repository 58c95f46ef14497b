"""The training loss by source: a sample's loss is its own source's, in every layout, whatever its labels weigh."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.train.source_losses import loss_by_domain
from tests.cases import is_long
from tests.ranks import run_ranks
from tests.tiny import LENGTH, train_here
from tests.transforming import FIRST_CHANGED, TRANSFORMS, transformed_settings

LAYOUTS = {"one rank": (1, {}), "DP2xTP2+SP": (4, {"tensor": 2, "sequence": True})}
if is_long():
    LAYOUTS |= {"DP2xPP2": (4, {"pipeline": 2}), "CP2": (2, {"context": 2})}
BATCH = 8


def settings_of(root, directory, parallel):
    """A source with a mask, prompts at half weight, metadata, and attention and loss within documents."""
    return transformed_settings(
        root,
        {**TRANSFORMS, "document_mask": True},
        parallel={"device": "cpu", **parallel},
        run={"directory": str(directory), "seed": 7},
        train={"micro_batch_size": 1, "precision": "fp32", "threads": 1, "stop_after_steps": 3},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The lines of each layout's run, whose third step is the first with transforms."""
    root, found = tmp_path_factory.mktemp("sources"), {}
    for name, (ranks, parallel) in LAYOUTS.items():
        run_ranks(ranks, train_here, settings_of(root, root / name, parallel))
        lines = (root / name / "metrics.jsonl").read_text().splitlines()
        found[name] = [json.loads(line) for line in lines]
    return root, found


def losses_of_single_samples(root, last):
    """(source, nats, weights) of each sample of a step, measured alone, with the weights that a run has saved."""
    from megatron_davinci.config import validate
    from megatron_davinci.data import Batches
    from megatron_davinci.platform.device import choose
    from megatron_davinci.train.loop import TrainingRun

    settings = settings_of(root, root / "reference", {})
    settings["train"] |= {"stop_after_steps": last}
    train_here(settings)
    from megatron_davinci.platform import distributed

    platform = choose("cpu", threads=1)
    distributed.start(platform, seed=1)
    run = TrainingRun(validate(settings, where="test"), platform)
    assert run.step == last
    plan = run.schedule.at(run.consumed_samples)
    run.order.prepare(plan)
    import torch

    curriculum, found = run.order.curriculum, []
    for n in range(plan.first_sample, plan.first_sample + plan.batch):
        ns = np.array([n])
        read = Batches(curriculum, run.sources).read(ns)
        tokens, mask = read.tokens, read.loss_mask
        if (transforms := run.transforms[plan.stage]) is not None:
            tokens, mask, _ = transforms.apply(curriculum, ns, tokens, mask)
        rows = torch.from_numpy(tokens.astype(np.int64))
        weights = None if mask is None else torch.from_numpy(mask)
        nats, weight = run.stepper.loss(rows, 1, 1, weights, run.document_masks[plan.stage])
        found.append((curriculum.locate(n).source, nats, weight))
    return found


def test_each_source_has_the_loss_of_its_own_samples(runs):
    root, lines = runs
    samples = run_ranks(1, losses_of_single_samples, root, 2)[0]
    assert len(samples) == BATCH and FIRST_CHANGED == 2 * BATCH
    for name in LAYOUTS:
        measured = lines[name][2]["sources"]
        assert set(measured) == {source for source, _, _ in samples}
        for source, record in measured.items():
            own = [(nats, weight) for of, nats, weight in samples if of == source]
            nats, weight = map(sum, zip(*own, strict=True))
            assert record["weight"] == weight > 0
            assert record["tokens"] == len(own) * LENGTH
            assert record["loss"] == pytest.approx(nats / weight, rel=1e-4), (name, source)
    # The samples of one source taken for another's would be noticed.
    values = sorted(record["loss"] for record in lines["one rank"][2]["sources"].values())
    assert min(b - a for a, b in itertools.pairwise(values)) > 1e-3


@pytest.mark.parametrize("name", LAYOUTS)
def test_their_weighted_mean_is_the_loss_of_the_step(name, runs):
    for line in runs[1][name]:
        sources = line["sources"].values()
        weights = [record["weight"] for record in sources]
        mean = np.average([record["loss"] for record in sources], weights=weights)
        assert mean == pytest.approx(line["loss"], abs=1e-6)
        assert sum(record["tokens"] for record in sources) == line["global_batch_size"] * LENGTH


def test_epochs_are_those_of_the_data_order(runs):
    from megatron_davinci.data import Source

    root, lines = runs
    taken = {}
    for line in lines["DP2xTP2+SP"]:
        for name, record in line["sources"].items():
            taken[name] = taken.get(name, 0) + record["tokens"] // LENGTH
            windows = Source.open(name, root / "data" / name, LENGTH).num_windows
            assert record["epoch"] == pytest.approx(taken[name] / windows, abs=1e-6)


def loss_and_weight():
    return st.fixed_dictionaries(
        {"loss": st.one_of(st.none(), st.floats(0.1, 10)), "weight": st.integers(1, 10**9)}
    )


@given(st.lists(st.dictionaries(st.sampled_from("abcd"), loss_and_weight()), max_size=5))
def test_a_domain_is_the_weighted_mean_of_its_sources(steps):
    domains = {"a": "x", "b": "x", "c": "y"}
    found = loss_by_domain(steps, domains)
    for domain, members in {"x": "ab", "y": "c", "d": "d"}.items():
        own = [one for step in steps for name, one in step.items() if name in members]
        own = [(one["loss"], one["weight"]) for one in own if one["loss"] is not None]
        assert (domain in found) == bool(own)
        if own:
            losses, weights = zip(*own, strict=True)
            assert found[domain] == pytest.approx(np.average(losses, weights=weights))
