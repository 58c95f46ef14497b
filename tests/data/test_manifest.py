"""A manifest says what a source is; a wrong one is never saved and never loaded."""

from __future__ import annotations

import hashlib
import json

import pytest
from pydantic import ValidationError

from megatron_davinci.data.indexed_writer import IndexedDatasetWriter
from megatron_davinci.data.manifest import Manifest, Shard
from megatron_davinci.errors import DataError


def shard(prefix: str = "part-0", digest: str = "0" * 64, tokens: int = 10) -> Shard:
    return Shard(prefix=prefix, tokens=tokens, documents=2, bin_bytes=2 * tokens, bin_sha256=digest)


def manifest(*shards: Shard, **changes: object) -> Manifest:
    fields = {
        "name": "web",
        "domain": "general",
        "dtype": "uint16",
        "vocab_size": 100,
        "eod_id": 0,
        "tokenizer_sha256": "a" * 64,
        "shards": shards or (shard(),),
    }
    return Manifest(**{**fields, **changes})


def test_what_is_saved_is_loaded(tmp_path):
    saved = manifest(shard(), shard("more/part-1", tokens=0), eod_id=None, tokenizer_sha256=None)
    saved.save(tmp_path)
    assert Manifest.load(tmp_path) == saved
    assert (saved.tokens, saved.documents) == (10, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_the_fingerprint_is_of_what_decides_the_windows():
    one, two = shard("a", "1" * 64), shard("b", "2" * 64)
    same = {
        manifest(one, two).fingerprint,
        manifest(one, two, name="other", domain="code", eod_id=3, vocab_size=50).fingerprint,
        manifest(shard("moved/a", "1" * 64), two).fingerprint,
    }
    assert len(same) == 1
    different = {
        manifest(two, one).fingerprint,
        manifest(one).fingerprint,
        manifest(one, shard("b", "3" * 64)).fingerprint,
        manifest(one, shard("b", "2" * 64, tokens=11)).fingerprint,
        manifest(
            *(Shard(**{**dict(s), "tokens": 5, "bin_bytes": 20}) for s in (one, two)), dtype="int32"
        ).fingerprint,
    }
    assert len(different | same) == 6


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("format", 2, "format"),
        ("name", None, "name: Field required"),
        ("vocab_size", "100", "vocab_size: Input should be a valid integer"),
        ("vocab_size", True, "vocab_size: Input should be a valid integer"),
        ("vocab_size", 70000, "does not hold the ids"),
        ("dtype", "uint32", "dtype is one of"),
        ("dtype", "float32", "dtype is one of"),
        ("eod_id", 100, "outside the vocabulary"),
        ("eod_id", -1, "eod_id"),
        ("tokenizer_sha256", "xyz", "tokenizer_sha256"),
        ("colour", "red", "colour: Extra inputs"),
        ("shards", {}, "shards"),
        ("shards[0].tokens", -1, "shards[0].tokens"),
        ("shards[0].tokens", 10**30, "shards[0].tokens"),
        ("shards[0].tokens", 11, "shards[0]: 11 tokens of uint16 are 22 bytes, not bin_bytes = 20"),
        ("shards[0].bin_sha256", None, "shards[0].bin_sha256: Field required"),
        ("shards[0].prefix", "/etc/x", "inside the manifest's folder"),
        ("shards[0].prefix", "a/../../x", "inside the manifest's folder"),
        ("shards[0].prefix", ".", "inside the manifest's folder"),
        ("shards[0].prefix", "./part-1", "part-1 is listed 2 times"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, field, value, says):
    manifest(shard(), shard("part-1")).save(tmp_path)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    inside, name = (content["shards"][0], field[10:]) if field.startswith("shards[0]") else (content, field)
    if value is None:
        del inside[name]
    else:
        inside[name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        Manifest.load(tmp_path)
    assert says in str(caught.value) and "manifest.json" in str(caught.value)


def test_what_is_no_manifest(tmp_path):
    with pytest.raises(DataError, match="has no manifest"):
        Manifest.load(tmp_path)
    for content in (b"", b"{", b"[]", b"\xff\xfe", b"3"):
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(DataError, match="manifest is wrong"):
            Manifest.load(tmp_path)


def test_a_wrong_one_cannot_be_made():
    with pytest.raises(ValidationError, match="outside the vocabulary"):
        manifest(eod_id=100)


class TestMasks:
    def test_without_masks_file_and_fingerprint_are_what_they_always_were(self, tmp_path):
        plain = manifest(shard("a", "1" * 64), shard("b", "2" * 64))
        plain.save(tmp_path)
        content = json.loads((tmp_path / "manifest.json").read_text())
        assert list(content["shards"][0]) == ["prefix", "tokens", "documents", "bin_bytes", "bin_sha256"]
        # What every checkpoint of such a source has sealed.
        sealed = json.dumps(["uint16", [[10, "1" * 64], [10, "2" * 64]]])
        assert plain.fingerprint == hashlib.sha256(sealed.encode()).hexdigest()
        assert not plain.has_mask

    def test_a_mask_is_saved_and_part_of_the_fingerprint(self, tmp_path):
        def masked(*digests: str | None) -> Manifest:
            return manifest(
                *(Shard(**dict(shard(str(k))) | {"mask_sha256": d}) for k, d in enumerate(digests))
            )

        one = masked("a" * 64, "b" * 64)
        one.save(tmp_path)
        assert Manifest.load(tmp_path) == one and one.has_mask
        assert (
            len({one.fingerprint, masked("a" * 64, "c" * 64).fingerprint, masked(None, None).fingerprint})
            == 3
        )
        with pytest.raises(ValidationError, match="all shards have a mask or none has; 0 has one, 1 has not"):
            masked("a" * 64, None)
        with pytest.raises(ValidationError, match="mask_sha256"):
            masked("a", "b")

    def test_a_shard_that_was_written_has_the_digest_of_its_index(self, tmp_path):
        with IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
            writer.add_document([1, 2, 3])
        content = (tmp_path / "a.idx").read_bytes()
        assert Shard.of("a", writer.written).idx_sha256 == hashlib.sha256(content).hexdigest()

    def test_a_shard_that_was_written_with_one_has_its_digest(self, tmp_path):
        with IndexedDatasetWriter(tmp_path / "a", "uint16", mask=True) as writer:
            writer.add_document([1, 2, 3], loss=[0, 1, 1])
        content = (tmp_path / "a.mask").read_bytes()
        assert Shard.of("a", writer.written).mask_sha256 == hashlib.sha256(content).hexdigest()
