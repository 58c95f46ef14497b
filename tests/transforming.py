"""Sources, a tokenizer and a run for tests of sample transforms, and what a sample has to be, built by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from megatron_davinci.data import Curriculum, IndexedDatasetWriter, Manifest, Shard, Source
from megatron_davinci.data.tokenizer import train_bpe
from megatron_davinci.data.transforms.draws import draws
from tests.tiny import LENGTH, tiny_settings

EOD = 256  # a byte-level vocabulary without a merge, its end, and three sentinels
PREFIX, SUFFIX, MIDDLE = 257, 258, 259
SENTINELS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
VOCABULARY = 264
METADATA = {"web": "U: w\n", "code": "U: c\n"}
METADATA_IDS = {"web": [52, 25, 220, 86, 198], "code": [52, 25, 220, 66, 198]}
FILLING = {
    "rate": 0.8, "sources": ["code"],
    "prefix_token": SENTINELS[0], "suffix_token": SENTINELS[1], "middle_token": SENTINELS[2],
}  # fmt: skip
TRANSFORMS: dict[str, Any] = {
    "prompt_loss_weight": 0.5,
    "metadata_prefix": {"fraction": 0.75},
    "fill_in_the_middle": FILLING,
}


def write_tokenizer(folder: Path) -> Path:
    """Bytes, the end of a document, and three special tokens."""
    text = folder.parent / "text.jsonl"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text('{"text": "a few words"}\n', encoding="utf-8")
    train_bpe([text], 257, folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(SENTINELS))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_documents(folder: Path, seed: int, *, mask: bool = False, eod_id: int | None = EOD) -> Path:
    """Short documents of a random walk, each with its end; with a mask, the beginning of each is its prompt."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    with IndexedDatasetWriter(folder / "shard-00000", np.uint16, mask=mask) as writer:
        for _ in range(250):
            steps = generator.integers(1, 4, size=int(generator.integers(0, 30)))
            tokens = [*(np.cumsum(steps) * (seed + 1) % 256), EOD]
            prompt = int(generator.integers(0, len(tokens)))
            loss = np.repeat([0, 1], [prompt, len(tokens) - prompt]) if mask else None
            writer.add_document(tokens, loss=loss)
    Manifest(
        name=folder.name, domain=folder.name, dtype="uint16", vocab_size=VOCABULARY, eod_id=eod_id,
        tokenizer_sha256=None, shards=(Shard.of("shard-00000", writer.written),),
    ).save(folder)  # fmt: skip
    return folder


def transformed_settings(
    root: Path, transforms: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """A run of a plain stage and a stage with `transforms`, over web, code and questions with a mask."""
    if not (root / "tokenizer").exists():
        write_tokenizer(root / "tokenizer")
        for seed, name in enumerate(("code", "qa", "web")):
            write_documents(root / "data" / name, seed, mask=name == "qa")
    names = ("code", "qa", "web")
    settings = tiny_settings(root, **changes)
    settings["model"] = {**settings["model"], "vocab_size": VOCABULARY}
    settings["data"] = {
        **settings["data"],
        "tokenizer": str(root / "tokenizer"),
        "sources": {
            name: {"path": str(root / "data" / name), "metadata": METADATA.get(name)} for name in names
        },
        "validation": {},
    }
    mixture = {"code": 0.4, "qa": 0.3, "web": 0.3}
    settings["curriculum"] = [
        {
            "name": name, "tokens": steps * 8 * LENGTH, "mixture": mixture, "global_batch_size": 8,
            "learning_rate": {"peak": 1e-2}, "transforms": of_stage,
        }
        for name, steps, of_stage in (
            ("plain", 2, {}), ("changed", 8, TRANSFORMS if transforms is None else transforms),
        )
    ]  # fmt: skip
    return settings


FIRST_CHANGED = 16
"""The first sample of the second stage."""


def by_hand(
    sources: dict[str, Source], curriculum: Curriculum, n: int, transforms: dict[str, Any], seed: int
) -> tuple[list[int], list[int], int]:
    """Sample `n` as the model has to see it: its tokens, the weights of its labels, and how many tokens are cut.

    Token by token from the file; only the chance is the program's own.
    """
    located = curriculum.locate(n)
    source = sources[located.source]
    whole = np.fromfile(str(source.shard_place(0)) + ".bin", np.uint16).tolist()
    first = located.window * LENGTH
    carries = np.ones(LENGTH, np.uint8)
    source.read_mask_into(located.window, carries)
    prompt, full = {0: (0, 1), 0.5: (1, 2), 1: (1, 1)}[transforms.get("prompt_loss_weight", 0)]
    weights = [0, *(full if one else prompt for one in carries)]
    texts: list[list[tuple[int, int]]] = [[]]
    for token, weight in zip(whole[first : first + LENGTH + 1], weights, strict=True):
        texts[-1].append((token, weight))
        if token == EOD:
            texts.append([])
    texts = [text for text in texts if text]
    begins = [first == 0 or whole[first - 1] == EOD] + [True] * (len(texts) - 1)
    if "fill_in_the_middle" in transforms and located.source == "code":
        chance = draws(seed, "fill in the middle", n, len(texts))
        for number, text in enumerate(texts):
            end = [pair for pair in text if pair[0] == EOD]
            body = [pair for pair in text if pair[0] != EOD]
            if not body or chance[number, 0] >= transforms["fill_in_the_middle"]["rate"]:
                continue
            low, high = sorted(int(u * (len(body) + 1)) for u in chance[number, 1:3])
            before, middle, after = body[:low], body[low:high], body[high:]
            mark = {token: [(token, full)] for token in (PREFIX, SUFFIX, MIDDLE)}
            if chance[number, 3] < transforms["fill_in_the_middle"].get("spm_fraction", 0.5):
                body = mark[PREFIX] + mark[SUFFIX] + after + mark[MIDDLE] + before + middle
            else:
                body = mark[PREFIX] + before + mark[SUFFIX] + after + mark[MIDDLE] + middle
            texts[number] = body + end
    if "metadata_prefix" in transforms and located.source in METADATA_IDS:
        share = transforms["metadata_prefix"].get("fraction", 1.0)
        if draws(seed, "metadata prefix", n, 1)[0, 0] < share:
            prefix = [(token, 0) for token in METADATA_IDS[located.source]]
            texts = [prefix + text if new else text for text, new in zip(texts, begins, strict=True)]
    pairs = [pair for text in texts for pair in text]
    tokens, label_weights = zip(*pairs[: LENGTH + 1], strict=True)
    return list(tokens), list(label_weights[1:]), len(pairs) - LENGTH - 1
