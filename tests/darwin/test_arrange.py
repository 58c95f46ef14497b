"""Documents by their vectors: clusters that were planted, a path along neighbours, sources written anew."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.cli.main import main
from megatron_davinci.darwin import rearranged
from megatron_davinci.darwin.arrange import closeness, groups_of, k_means, neighbours, path
from megatron_davinci.darwin.rearranged import ARRANGEMENT, Documents, write_source
from megatron_davinci.darwin.vectors import vectors
from megatron_davinci.data.indexed import IndexedDataset
from megatron_davinci.data.indexed_writer import IndexedDatasetWriter
from megatron_davinci.data.manifest import Manifest, Shard
from megatron_davinci.data.sidecar import origin_of, origins_of, write_rows
from megatron_davinci.errors import DataError
from tests.cases import cases

TOPICS, EACH = 5, 16


def planted(seed=0):
    """Documents of five topics, each with words of its own among common ones, in a drawn order."""
    draw = np.random.default_rng(seed)
    topic = draw.permutation(np.repeat(np.arange(TOPICS), EACH))
    return topic, [
        np.where(
            draw.random(size) < 0.5, draw.integers(1, 200, size), draw.integers(1, 60, size) + 200 * (own + 1)
        )
        for own, size in zip(topic, draw.integers(60, 300, len(topic)), strict=True)
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A source of two shards with sidecars; token 0 ends each document."""
    folder = tmp_path_factory.mktemp("arrange") / "source"
    _, documents = planted()
    shards = []
    for number, own in enumerate((documents[:50], documents[50:])):
        prefix = f"shard-{number:05d}"
        with IndexedDatasetWriter(folder / prefix, np.uint16) as writer:
            for tokens in own:
                writer.add_document(np.append(tokens, 0).astype(np.uint16))
        shards.append(Shard.of(prefix, writer.written))
        begin = 50 * number
        write_rows(
            folder / prefix, ({"id": f"s/{begin + k}", "path": "raw", "level": 2} for k in range(len(own)))
        )
    Manifest(name="s", domain="general", dtype="uint16", vocab_size=2000, eod_id=0, tokenizer_sha256=None,
             shards=tuple(shards)).save(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize("seed", range(2))
def test_planted_topics_are_the_clusters_and_the_neighbours(seed):
    topic, documents = planted(seed)
    found = vectors(documents, 16, seed=seed)
    assert found.dtype == np.float32 and np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
    assert (found == vectors(documents, 16, seed=seed)).all()
    own = k_means(found, TOPICS, seed)
    assert len({(a, b) for a, b in zip(topic.tolist(), own.tolist(), strict=True)}) == TOPICS
    near, similar = neighbours(found, 5)
    assert (topic[near] == topic[:, None]).mean() > 0.98
    assert (np.diff(similar, axis=1) <= 0).all() and (near != np.arange(len(near))[:, None]).all()
    order = path(near, similar)
    assert (topic[order][1:] == topic[order][:-1]).mean() >= 0.75  # 0.2 by chance
    assert closeness(found, order) > closeness(found, np.arange(len(found))) + 0.2


def test_neighbours_are_those_of_all_pairs():
    found = vectors(planted()[1], 8)
    similar = found @ found.T
    np.fill_diagonal(similar, -2)
    _, values = neighbours(found, 3)
    assert values == pytest.approx(-np.sort(-similar, axis=1)[:, :3], abs=1e-6)
    few, _ = neighbours(found[:3], 5)
    assert (np.sort(few, axis=1)[:, :3] == -1).all() and sorted(few[0].tolist()) == [-1, -1, -1, 1, 2]


def test_no_cluster_is_empty_and_the_largest_comes_first():
    same = np.tile(np.eye(4, dtype=np.float32)[:1], (9, 1))
    for clusters in (1, 3, 9):
        counts = np.bincount(k_means(same, clusters), minlength=clusters)
        assert counts.min() > 0 and (np.diff(counts) <= 0).all()
    alone = vectors([np.array([], np.int64), np.array([3, 4]), np.array([3, 4]), np.array([9, 8])], 2)
    assert np.linalg.norm(alone, axis=1) == pytest.approx([0, 1, 1, 0])


@cases(30)
@given(st.data())
def test_the_path_is_that_of_the_algorithm(data):
    count, most = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    draw = np.random.default_rng(data.draw(st.integers(0, 99)))
    found = draw.standard_normal((count, 3)).astype(np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    near, similar = neighbours(found, most)
    edges = {}
    for one in range(count):
        for other, weight in zip(near[one].tolist(), similar[one].tolist(), strict=True):
            if other >= 0:
                edges.setdefault(one, {})[other] = edges.setdefault(other, {})[one] = weight
    left, expected, here = set(range(count)), [], None
    while left:
        close = [other for other in edges.get(here, {}) if other in left]
        if close:
            here = max(close, key=lambda other: edges[here][other])
        else:
            here = min(left, key=lambda one: (len(edges.get(one, {})), one))
        expected.append(here)
        left.discard(here)
    assert path(near, similar).tolist() == expected


def test_groups_hold_as_many_tokens_as_they_may():
    lengths = np.array([5, 5, 30, 2, 3, 4])
    order = np.array([1, 0, 2, 5, 4, 3])
    assert [group.tolist() for group in groups_of(order, lengths, 10)] == [[1, 0], [2], [5, 4, 3]]
    assert groups_of(np.empty(0, np.int64), lengths, 10) == []


def test_a_source_in_the_order_of_neighbours_holds_each_document_once(source, tmp_path, capsys):
    out = tmp_path / "near"
    assert main(["data", "neighbours", str(source), "--out", str(out), "--group-tokens", "900"]) == 0
    assert "in this order" in capsys.readouterr().out
    manifest, documents = Manifest.load(out), Documents(source)
    [shard] = manifest.shards
    dataset, seen = IndexedDataset(out / shard.prefix), []
    for number in range(len(dataset)):
        tokens, at = np.asarray(dataset[number]), 0
        members = origins_of(out / shard.prefix, number, 0, len(tokens))
        assert len(tokens) <= 900 and (tokens == 0).sum() == len(members)
        for member in members:
            own = documents[int(member["id"].split("/")[1])]
            assert (tokens[at : at + len(own)] == own).all()
            assert origins_of(out / shard.prefix, number, at, at + 1) == [member]
            at += len(own)
            seen.append(member["id"])
        assert at == len(tokens)
        assert origin_of(out / shard.prefix, number)["id"] == members[0]["id"]
    assert sorted(seen) == sorted(f"s/{k}" for k in range(TOPICS * EACH))
    said = json.loads((out / ARRANGEMENT).read_text())
    assert said["of"]["fingerprint"] == Manifest.load(source).fingerprint and said["groups"] == len(dataset)
    near = said["similarity"]
    assert near["in this order"] > max(near["as they were"], near["in a drawn order"]) + 0.2
    assert main(["data", "neighbours", str(source), "--out", str(out)]) == 2


def test_clusters_are_sources_that_hold_each_document_once(source, tmp_path, capsys):
    out = tmp_path / "clusters"
    assert main(["data", "cluster", str(source), "--out", str(out), "--clusters", str(TOPICS)]) == 0
    assert "s.c4" in capsys.readouterr().out
    topic, _ = planted()
    seen = []
    for folder in sorted(out.iterdir()):
        manifest = Manifest.load(folder)
        assert manifest.name == folder.name and manifest.documents == EACH
        prefix = folder / manifest.shards[0].prefix
        own = [int(origin_of(prefix, number)["id"].split("/")[1]) for number in range(EACH)]
        assert len(set(topic[own])) == 1 and own == sorted(own)
        seen += own
    assert sorted(seen) == list(range(TOPICS * EACH))
    assert main(["data", "cluster", str(source), "--out", str(tmp_path / "x"), "--clusters", "81"]) == 2


def test_a_folder_that_cannot_be_made_is_said(source, tmp_path, capsys):
    (tmp_path / "file").write_text("of somebody")
    for out in ("file", "file/within"):
        assert main(["data", "neighbours", str(source), "--out", str(tmp_path / out)]) != 0
        assert "error: " in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "of somebody"


@pytest.mark.parametrize("stopped_by", [KeyboardInterrupt, DataError("no")])
def test_a_stopped_arrangement_leaves_nothing_behind(source, tmp_path, monkeypatch, stopped_by):
    documents = Documents(source)
    groups = [np.array([number]) for number in range(len(documents))]

    def full(path, manifest):
        raise stopped_by

    monkeypatch.setattr(rearranged, "write_json", full)
    with pytest.raises((KeyboardInterrupt, DataError)):
        write_source(documents, groups, tmp_path / "near", "near", {}, None)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_arranged_is_said(source, tmp_path):
    manifest = Manifest.load(source)
    manifest.model_copy(update={"eod_id": None}).save(tmp_path)
    with pytest.raises(DataError, match="eod_id"):
        Documents(tmp_path)
    masked = tuple(shard.model_copy(update={"mask_sha256": "0" * 64}) for shard in manifest.shards)
    manifest.model_copy(update={"shards": masked}).save(tmp_path)
    with pytest.raises(DataError, match="mask"):
        Documents(tmp_path)
