"""Which token ends a document, as the sources of a run say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_davinci.data import IndexedDatasetWriter, Manifest, Shard, Source
from megatron_davinci.errors import ConfigError, DataError
from megatron_davinci.model.documents import DocumentMask
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train import micro_batches
from megatron_davinci.train.documents import document_masks, uses_documents
from megatron_davinci.train.edits import EditFile, Point
from megatron_davinci.train.order import DataOrder
from megatron_davinci.train.outlook import widened
from megatron_davinci.train.run_directory import RunDirectory
from tests.tiny import LENGTH, tiny_config, tiny_settings


@pytest.fixture
def sources(tmp_path):
    """Makes sources with documents of `tokens`, then `ends_with` if it is not None; the manifests say `ends`."""

    def make(*, tokens=3 * LENGTH, ends_with=5, **ends):
        made = {}
        for name, end in ends.items():
            folder = tmp_path / "sources" / name
            folder.mkdir(parents=True)
            with IndexedDatasetWriter(folder / "shard-00000", np.uint16) as writer:
                for _ in range(4):
                    writer.add_document([1] * tokens + ([] if ends_with is None else [ends_with]))
            Manifest(
                name=name, domain=name, dtype="uint16", vocab_size=9, eod_id=end, tokenizer_sha256=None,
                shards=(Shard.of("shard-00000", writer.written),),
            ).save(folder)  # fmt: skip
            made[name] = Source.open(name, folder, LENGTH)
        return made

    return make


def config(tmp_path, transforms, mixture=None):
    stages = tiny_settings(tmp_path)["curriculum"]
    second = {**stages[1], "transforms": transforms, "mixture": mixture or stages[1]["mixture"]}
    return tiny_config(tmp_path, curriculum=[stages[0], second])


def test_each_stage_has_its_own(tmp_path, sources):
    asked = config(tmp_path, {"document_mask": True, "reset_positions": True})
    assert uses_documents(asked)
    assert document_masks(asked, sources(a=5, b=5)) == [None, DocumentMask(5, reset_positions=True)]


def test_nothing_is_asked_of_sources_where_no_stage_has_documents(tmp_path, sources):
    asked = config(tmp_path, {})
    assert not uses_documents(asked)
    assert document_masks(asked, sources(a=None, b=5)) == [None, None]


def test_a_source_that_does_not_say_is_named(tmp_path, sources):
    with pytest.raises(DataError, match="manifest of a") as caught:
        document_masks(config(tmp_path, {"document_mask": True}), sources(a=None, b=5))
    assert "document_mask" in str(caught.value)


def test_a_source_of_weight_0_is_not_asked(tmp_path, sources):
    asked = config(tmp_path, {"document_mask": True}, mixture={"a": 0, "b": 1})
    assert document_masks(asked, sources(a=None, b=5)) == [None, DocumentMask(5)]


def test_sources_that_disagree_are_listed(tmp_path, sources):
    with pytest.raises(DataError) as caught:
        document_masks(config(tmp_path, {"document_mask": True}), sources(a=4, b=5))
    assert "a: 4, b: 5" in str(caught.value)


def test_what_an_edit_brings_into_a_masked_stage_ends_its_documents_alike(tmp_path, sources):
    asked = config(tmp_path, {"document_mask": True}, mixture={"a": 1})
    opened = sources(a=5, b=4)
    schedule, directory = Schedule(asked.curriculum, LENGTH), RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    order = DataOrder(asked, schedule, opened, directory)
    begin = schedule.stage_first_sample(1)
    file = EditFile(directory.edits)
    file.add(Point(sample=begin), {"b": "1"}, "to see it refused")
    assert not order.revise(schedule.at(0), lambda: None, edited=True)
    assert order.messages() == [
        "edit-1 is left out: the document mask of stage second does not allow it: a: 5, b: 4."
    ]
    file.add(Point(sample=0), {"b": "1"}, "where no documents are masked")
    assert order.revise(schedule.at(0), lambda: None, edited=True)
    [changed] = [record for record in order.records if record.origin == "edit-2"]
    assert changed.first_sample < begin
    # A start is refused where the record says that such a stage has such a source.
    brought = widened(asked, [replace(changed, stage="second")])
    with pytest.raises(DataError, match="a: 5, b: 4"):
        document_masks(brought, opened)


def test_positions_do_not_restart_where_attention_goes_on(tmp_path):
    with pytest.raises(ConfigError, match="needs document_mask: true"):
        config(tmp_path, {"reset_positions": True})


@pytest.mark.parametrize("tokens", [11, LENGTH - 1, LENGTH, 3 * LENGTH])
def test_documents_that_end_otherwise_than_the_manifest_says_are_refused(tokens, tmp_path, sources):
    asked = config(tmp_path, {"document_mask": True}, mixture={"a": 1})
    with pytest.raises(DataError, match="do not end with the token") as caught:
        document_masks(asked, sources(tokens=tokens, ends_with=4, a=5))
    assert f"token {tokens}" in str(caught.value)


def test_a_document_that_ends_in_no_window_says_nothing(tmp_path):
    # The shard's last tokens are in no window: only they would tell.
    folder = tmp_path / "one"
    folder.mkdir()
    with IndexedDatasetWriter(folder / "shard-00000", np.uint16) as writer:
        writer.add_document([1] * (2 * LENGTH + 9))
    source = Source.open("a", folder / "shard-00000", LENGTH)
    source.eod_id = 5
    asked = config(tmp_path, {"document_mask": True}, mixture={"a": 1})
    assert document_masks(asked, {"a": source}) == [None, DocumentMask(5)]


def test_a_pipeline_rank_without_tokens_does_not_go_on_without_documents():
    nothing = micro_batches.split(None, None, DocumentMask(5), 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="every pipeline rank needs the tokens"):
        next(nothing)
    assert list(micro_batches.split(None, None, None, 1, torch.device("cpu"))) == []
