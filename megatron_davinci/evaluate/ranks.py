"""Rank 0 has the tasks; the other ranks compute what it asks for, and know nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.evaluate.endings import stopper
from megatron_davinci.evaluate.engine import Engine, Likelihood
from megatron_davinci.evaluate.harness import Pair
from megatron_davinci.platform.distributed import broadcast_object


class Leader:
    """Rank 0's hold of all ranks. Use it as a context manager; at its end the others stop waiting for work.

    Args:
        engine: This rank's.
        tokenizer: The model's, which every rank has.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self._engine, self._tokenizer = engine, tokenizer

    def __enter__(self) -> Leader:
        return self

    def __exit__(self, *error: object) -> None:
        broadcast_object(None)

    def log_likelihoods(self, requests: Sequence[Pair]) -> list[Likelihood]:
        """As `Engine.log_likelihoods`."""
        found: list[Likelihood] = self._together("log_likelihoods", requests)
        return found

    def generate(
        self, prompts: Sequence[Sequence[int]], until: Sequence[Sequence[str]], most: Sequence[int]
    ) -> list[list[int]]:
        """As `Engine.generate`; a text ends with the first of its strings, or with its document."""
        found: list[list[int]] = self._together("generate", prompts, until, most)
        return found

    def token_scores(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """As `Engine.token_scores`."""
        found: list[np.ndarray] = self._together("token_scores", sequences)
        return found

    def last_states(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """As `Engine.last_states`."""
        found: np.ndarray = self._together("last_states", sequences)
        return found

    def _together(self, *work: Any) -> Any:
        return _perform(self._engine, self._tokenizer, *broadcast_object(work))


def follow(engine: Engine, tokenizer: Tokenizer) -> None:
    """Compute what rank 0 asks for, until it has nothing more to ask."""
    while (work := broadcast_object(None)) is not None:
        _perform(engine, tokenizer, *work)


def _perform(engine: Engine, tokenizer: Tokenizer, what: str, *arguments: Any) -> Any:
    if what == "generate":
        prompts, until, most = arguments
        return engine.generate(prompts, stopper(tokenizer, until), most)
    return getattr(engine, what)(*arguments)
