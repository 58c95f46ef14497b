"""The baseline: a bigram model that has seen exactly the tokens that the run consumed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

from megatron_davinci.config import RunConfig
from megatron_davinci.data import Curriculum, Journal, Source
from megatron_davinci.evaluate.bigram import BigramKneserNey
from megatron_davinci.evaluate.heldout import choose_windows


def compare(config: RunConfig) -> dict:
    """Fit the bigram model and measure it where the run was measured last.

    Returns:
        `heldout_loss` and `bigram_loss` (nats a token, by domain), `heldout_bits_per_byte` and `tokens` (consumed
        by the run).
    """
    run, length, vocabulary = config.run.directory, config.data.sequence_length, config.model.vocab_size
    last = json.loads((run / "evals.jsonl").read_text().splitlines()[-1])
    bigram = BigramKneserNey.fit(consumed_windows(config, last["consumed_samples"]), vocabulary)
    losses = {}
    for domain, path in config.data.validation.items():
        source = Source.open(domain, path, length)
        # The same windows as in the loop: the layouts of this example measure whole multiples of their ranks.
        count = last["heldout_tokens"][domain] // length
        windows = choose_windows(source.num_windows, count, 1, domain)
        losses[domain] = bigram.loss(source.read(int(window)) for window in windows)
    measured = {key: last[key] for key in ("heldout_loss", "heldout_bits_per_byte")}
    return measured | {"bigram_loss": losses, "tokens": last["consumed_tokens"]}


def consumed_windows(config: RunConfig, samples: int) -> Iterator[np.ndarray]:
    """Every window that the run's first samples were, once each.

    A window that came again in a later epoch is one text all the same: counted twice, no bigram in it would look
    rare, and Kneser-Ney's discounts, which rest on what was seen once, would be wrong.
    """
    sources = {
        name: Source.open(name, source.path, config.data.sequence_length)
        for name, source in config.data.sources.items()
    }
    journal = Journal.open(config.run.directory / "journal.jsonl")
    windows = {name: source.num_windows for name, source in sources.items()}
    curriculum = Curriculum(windows, config.run.seed, journal.mixes)
    locations = curriculum.locate_many(np.arange(samples))
    seen = np.unique(np.stack([locations.source, locations.window], axis=1), axis=0)
    names = curriculum.sources
    for source, window in seen.tolist():
        yield sources[names[source]].read(window)
