"""Samples by number, as tokens, in whatever batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_davinci.data.batches import Batch, Batches
from megatron_davinci.data.curriculum import Curriculum
from megatron_davinci.data.indexed_writer import IndexedDatasetWriter
from megatron_davinci.data.journal import MixRecord
from megatron_davinci.data.source import Source
from megatron_davinci.errors import DataError

S = 8
MIX = MixRecord(0, "a", {"web": "0.7", "code": "0.3"})


def source(folder: Path, name: str, tokens: np.ndarray, **options: int) -> Source:
    with IndexedDatasetWriter(folder / name, "uint16") as writer:
        writer.add_document(tokens)
    return Source.open(name, folder / name, S, **options)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Source]:
    return {
        "web": source(tmp_path, "web", np.arange(20 * S + 1)),
        "code": source(tmp_path, "code", 1000 + np.arange(5 * S + 1)),
    }


@pytest.fixture
def batches(sources: dict[str, Source]) -> Batches:
    windows = {name: source.num_windows for name, source in sources.items()}
    return Batches(Curriculum(windows, 1, [MIX]), sources)


def same(one: Batch, other: Batch) -> bool:
    return np.array_equal(one.tokens, other.tokens) and np.array_equal(one.source, other.source)


class TestReading:
    def test_gives_the_windows_that_the_curriculum_names(self, batches, sources):
        ns = np.array([5, 0, 99, 5])
        batch = batches.read(ns)
        assert (batch.tokens.shape, batch.tokens.dtype, batch.source.dtype) == (
            (4, S + 1),
            np.uint16,
            np.int32,
        )
        for row, place, n in zip(batch.tokens, batch.source, ns.tolist()):
            at = batches.curriculum.locate(n)
            assert batches.curriculum.sources[place] == at.source
            assert row.tolist() == sources[at.source].read(at.window).tolist()

    def test_does_not_depend_on_how_the_samples_are_grouped(self, batches):
        whole = batches.read(np.arange(60))
        for ranks in (1, 2, 3, 5):
            for rank in range(ranks):
                mine = np.arange(rank, 60, ranks)
                part = batches.read(mine)
                assert same(part, Batch(whole.tokens[mine], whole.source[mine]))

    def test_one_epoch_of_a_source_is_all_of_its_tokens(self, batches):
        batch = batches.read(np.arange(40))
        web = batch.tokens[batch.source == batches.curriculum.sources.index("web")][:20]
        assert sorted(web[:, :-1].reshape(-1).tolist()) == list(range(20 * S))

    def test_of_nothing_is_nothing(self, batches):
        assert batches.read(np.array([], np.int64)).tokens.shape == (0, S + 1)

    def test_what_comes_back_is_the_callers_own(self, batches):
        batches.read(np.arange(5)).tokens[:] = 0
        assert batches.read(np.arange(5)).tokens.any()

    def test_a_token_outside_the_vocabulary_is_not_handed_on(self, tmp_path):
        bad = {"web": source(tmp_path, "web", np.full(20, 500), vocab_size=100)}
        batches = Batches(Curriculum({"web": 2}, 1, [MixRecord(0, "a", {"web": "1"})]), bad)
        with pytest.raises(DataError, match="outside the model's vocabulary"):
            batches.read(np.array([0]))


class TestOpening:
    def test_sources_are_those_of_the_curriculum(self, sources):
        for windows in ({"web": 20}, {"web": 20, "code": 6}, {"web": 20, "code": 5, "maths": 1}):
            with pytest.raises(DataError, match="not those of the curriculum"):
                Batches(Curriculum(windows, 1), sources)

    def test_sources_have_one_sequence_length(self, tmp_path, sources):
        sources["code"] = Source.open("code", tmp_path / "code", 2 * S)
        with pytest.raises(DataError, match="several sequence lengths"):
            Batches(Curriculum({"web": 20, "code": 2}, 1), sources)

    def test_the_order_of_the_mapping_does_not_matter(self, sources, batches):
        turned = Batches(batches.curriculum, dict(reversed(sources.items())))
        assert same(turned.read(np.arange(30)), batches.read(np.arange(30)))
