"""A source in S3 is held against its manifest as a local one is, and leaves the cache alone."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from botocore.loaders import create_loader

from megatron_davinci.data.indexed_writer import IndexedDatasetWriter
from megatron_davinci.data.source import Source
from megatron_davinci.data.survey import make_manifest
from megatron_davinci.data.verify import verify_source
from tests.cli.screen import davinci
from tests.data.s3_server import at, proxy, store

__all__ = ["at", "proxy", "store"]  # fixtures


@pytest.fixture(autouse=True)
def _models_are_read_once(monkeypatch):
    monkeypatch.setattr("botocore.session.create_loader", lru_cache(create_loader))


@pytest.fixture
def source(tmp_path, store):
    tokens = np.random.default_rng(0).integers(0, 100, 900)
    for k in range(3):
        with IndexedDatasetWriter(tmp_path / f"part-{k}", "uint16", mask=True) as writer:
            writer.add_document(tokens[300 * k : 300 * (k + 1)], loss=tokens[:300] % 2)
    make_manifest(tmp_path, name="web", vocab_size=100).save(tmp_path)
    for path in tmp_path.iterdir():
        store.put(f"web/{path.name}", path.read_bytes())
    return "s3://bucket/web"


def test_a_whole_source_and_one_with_other_bytes(source, at, proxy, store, monkeypatch, tmp_path):
    assert not any(verify_source(at("web"), deep=True).problems)
    cache = tmp_path / "cache"
    assert not any(path.is_file() for path in cache.rglob("*")), "a corpus would push everything else out"
    Source.open("web", at("web"), 32).read(0)
    assert any(path.is_file() for path in cache.rglob("*"))
    store.put("web/part-1.bin", (tmp_path / "part-1.bin").read_bytes()[:-2] + b"\x07\x00")
    store.put("web/part-2.mask", (tmp_path / "part-2.mask").read_bytes()[:-1])
    # Through the command, which finds the server as every program does.
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    screen = davinci("data", "verify", source)
    assert screen.code == 2 and "2 problems in 2 of 3 shards" in screen.err
    one, two = screen.err.split("its bytes differ.")[1].split("A mask has the wrong size.")
    assert "where s3://bucket/web/part-1.bin\n" in one and "where s3://bucket/web/part-2.mask, bytes" in two
