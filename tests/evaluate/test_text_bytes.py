"""Bits a byte: a token's bytes are those of the text that it is encoded from, and those of the right labels count."""

from __future__ import annotations

import json
import math
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from megatron_davinci.config import validate
from megatron_davinci.data import IndexedDatasetWriter, Manifest, Shard, Source
from megatron_davinci.data.tokenizer import EOD, Tokenizer, train_bpe
from megatron_davinci.evaluate.heldout import HeldOutEvaluator, choose_windows
from megatron_davinci.evaluate.text_bytes import bytes_of_tokens
from tests.ranks import run_ranks
from tests.tiny import tiny_settings

WORDS = "der Fluß floss; the naïve café 漢字 かな 🙂 x = y + 1\n" * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.jsonl").write_text(json.dumps({"text": WORDS}))
    return train_bpe([folder / "text.jsonl"], 300, folder)


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_the_tokens_of_a_text_have_its_bytes(folder, text):
    tokenizer = Tokenizer.load(folder)
    sizes = bytes_of_tokens(tokenizer)
    assert sizes[tokenizer.encode_batch([text])[0]].sum() == len(unicodedata.normalize("NFC", text).encode())
    assert sizes[tokenizer.eod_id] == 0


def test_an_added_token_that_is_no_special_one_stands_for_its_text(folder, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    one = dict(content["added_tokens"][0], id=300, content="<é>", special=False)
    content["added_tokens"].append(one)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert bytes_of_tokens(Tokenizer.load(tmp_path))[300] == 4


def test_other_kinds_of_tokenizer_have_no_bytes_of_their_own(tmp_path):
    wordpiece = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    fallback = tokenizers.Tokenizer(models.BPE({"▁": 0, "a": 1, "b": 2}, [], byte_fallback=True))
    # One that decodes to bytes, with a token that no bytes are written as.
    odd = tokenizers.Tokenizer(models.BPE({" ": 0, "a": 1, "b": 2}, []))
    odd.pre_tokenizer, odd.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    for name, made in (("wordpiece", wordpiece), ("fallback", fallback), ("odd", odd)):
        made.add_special_tokens([EOD])
        made.save(str(tmp_path / f"{name}.json"))
        loaded = Tokenizer.load(tmp_path / f"{name}.json")
        assert loaded.eod_id == 3
        assert bytes_of_tokens(loaded) is None, name


def write_source(folder: Path, tokenizer: Tokenizer, *, made_by: str | None) -> None:
    """Documents of 1 to 30 words, the first half of each without loss."""
    generator = np.random.default_rng(4)
    words = WORDS.split(" ")
    with IndexedDatasetWriter(folder / "s", np.uint16, mask=True) as writer:
        for _ in range(80):
            text = " ".join(generator.choice(words, generator.integers(1, 30)))
            ids = np.append(tokenizer.encode_batch([text])[0], tokenizer.eod_id)
            writer.add_document(ids, loss=np.arange(len(ids)) >= len(ids) // 2)
    Manifest(
        name="v",
        domain="v",
        dtype="uint16",
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        tokenizer_sha256=made_by,
        shards=(Shard.of("s", writer.written),),
    ).save(folder)


def measured(configured: dict) -> dict[str, float]:
    """Bits a byte of held-out sources, with 2 nats for each label that carries loss."""
    import torch

    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose
    from megatron_davinci.train.micro_batches import label_weight

    distributed.start(choose("cpu", threads=1), seed=1)

    def loss(tokens, micro_batches, rows, mask, documents):
        weight = torch.tensor(label_weight(tokens, mask, documents)[0])
        torch.distributed.all_reduce(weight)
        return 2 * float(weight), float(weight)

    return HeldOutEvaluator(validate(configured, "test")).evaluate(loss).bits_per_byte


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_bits_are_the_nats_over_the_bytes_of_the_labels_with_loss(folder, tmp_path, ranks, document_mask):
    tokenizer = Tokenizer.load(folder)
    for name, made_by in (("ours", tokenizer.sha256), ("another", "0" * 64), ("unknown", None)):
        write_source(tmp_path / name, tokenizer, made_by=made_by)
    configured = tiny_settings(
        tmp_path,
        model={"vocab_size": 300},
        data={
            "tokenizer": str(folder),
            "validation": {name: str(tmp_path / name) for name in ("ours", "another", "unknown")},
        },
        evaluation={"every_steps": 4, "document_mask": document_mask},
    )
    found = run_ranks(ranks, measured, configured)
    assert found[1:] == [{}] * (ranks - 1)

    config = validate(configured, "test")
    source = Source.open("ours", tmp_path / "ours", config.data.sequence_length)
    nats, pieces = 0, b""
    for window in choose_windows(source.num_windows, config.evaluation.sequences, ranks, "ours").tolist():
        tokens, mask = source.read(window), np.empty(source.sequence_length, np.uint8)
        source.read_mask_into(window, mask)
        for before, label, carries in zip(tokens, tokens[1:], mask):
            if carries and not (document_mask and before == tokenizer.eod_id):
                nats += 2
                name = tokenizer._backend.id_to_token(int(label))
                pieces += b"" if label == tokenizer.eod_id else b"." * len(name)
    assert found[0] == {"ours": pytest.approx(nats / math.log(2) / len(pieces))}
