"""Sources and batches of a few windows, for tests of whoever reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_davinci.data import Batch, Batches, Curriculum, IndexedDatasetWriter, MixRecord, Source

S = 8
VOCABULARY = 2000


def write(prefix: Path, tokens: np.ndarray, dtype: str = "uint16", loss: np.ndarray | None = None) -> Path:
    """One indexed dataset of one document."""
    with IndexedDatasetWriter(prefix, dtype, mask=loss is not None) as writer:
        writer.add_document(tokens, loss=loss)
    return prefix


def batches_of(
    folder: Path, *, dtypes: tuple[str, str] = ("uint16", "uint16"), mask: bool = False
) -> Batches:
    """Two sources, `web` with 20 windows and `code` with 5, mixed 7 to 3."""
    generator = np.random.default_rng(3)
    sources = {}
    for name, count, dtype in (("web", 20, dtypes[0]), ("code", 5, dtypes[1])):
        loss = generator.integers(0, 2, count * S + 1) if mask and name == "code" else None
        prefix = write(folder / name, generator.integers(0, VOCABULARY, count * S + 1), dtype, loss)
        sources[name] = Source.open(name, prefix, S, vocab_size=VOCABULARY)
    windows = {name: source.num_windows for name, source in sources.items()}
    mixture = MixRecord(0, "a", {"web": "0.7", "code": "0.3"})
    return Batches(Curriculum(windows, 1, [mixture]), sources)


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches are equal, to the bit and the dtype."""
    pairs = list(zip(one, other, strict=True))
    return all(
        (a is None) == (b is None) and (a is None or (a.dtype == b.dtype and np.array_equal(a, b)))
        for a, b in pairs
    )
