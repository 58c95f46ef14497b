"""A checkpoint's model as it is measured: log-likelihoods of tokens and greedy continuations, on any layout.

Megatron-Core's own inference engine needs CUDA. Here tensor ranks compute together what they compute in training,
pipeline ranks hand on the states of one batch after the other, and each data-parallel replica takes every n-th batch.
Every rank is given the same work and cuts it the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_davinci.config.model import ModelConfig
from megatron_davinci.errors import ConfigError
from megatron_davinci.evaluate.packing import Batch, Row, alike, batches
from megatron_davinci.evaluate.readings import Readings
from megatron_davinci.model.branches import Branches, KeyValueCache
from megatron_davinci.model.without_gradients import without_gradients
from megatron_davinci.platform.distributed import gather_objects

# What the logits of one piece of a batch may take: 64 MB in fp32.
_LOGITS = 16 * 2**20
# What a forward pass over prompts costs besides its tokens, in tokens, on a CPU. On a GPU it costs more, and still
# little beside the passes that follow, one a token.
_PASS = 64

Progress = Callable[[int, int], None]
_Read = Callable[[Tensor, int], Tensor]
Choose = Callable[[Sequence[int], Tensor], Tensor]


class Likelihood(NamedTuple):
    """How likely a continuation is.

    Attributes:
        log: Sum of its tokens' log-probabilities, nats; NaN where a logit is not a number.
        greedy: Whether each of its tokens is the likeliest.
    """

    log: float
    greedy: bool


@dataclass(frozen=True)
class Limits:
    """How much is computed at once.

    Attributes:
        tokens: Places of a batch's rows, at most.
        sequences: That are generated at once, at most.
    """

    tokens: int = 4096
    sequences: int = 64


class Engine:
    """Runs a model; every method is called by all ranks with the same arguments, and answers on all.

    Args:
        chunk: This rank's part of the model, loaded. A pipeline rank has one.
        model: The configuration's section.
        device: What to compute on.
        limits: How much is computed at once.
        trained: Whether the model is trained on; otherwise it is made into one that cannot be.
    """

    def __init__(
        self,
        chunk: Any,
        model: ModelConfig,
        device: torch.device,
        limits: Limits | None = None,
        *,
        trained: bool = False,
    ) -> None:
        self.chunk, self.model, self.device = chunk.eval(), model, device
        if not trained:
            without_gradients(self.chunk)
        self.limits = limits or Limits()
        self._tensor = parallel_state.get_tensor_model_parallel_group()
        self._readings = Readings(self._tensor)
        self._pipeline = parallel_state.get_pipeline_model_parallel_group()
        self._first = parallel_state.is_pipeline_first_stage()
        self._last = parallel_state.is_pipeline_last_stage()
        self._replica = parallel_state.get_data_parallel_rank()
        self._replicas = parallel_state.get_data_parallel_world_size()
        self._dtype = next(chunk.parameters()).dtype
        # A row's length at which scores and their weighted sum cost what the matrices cost.
        matrices = model.parameters(embeddings=False, active=True) / model.num_layers
        self._balance = matrices / (2 * model.num_attention_heads * model.kv_channels)

    @torch.inference_mode()
    def log_likelihoods(
        self,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        progress: Progress = lambda done, total: None,
    ) -> list[Likelihood]:
        """How likely each continuation is after its context.

        Args:
            requests: Token ids of contexts and of continuations, neither of them empty, together at most
                `max_sequence_length + 1`.
            progress: Is told sequences done, and sequences in all, of this replica.
        """
        whole = [[*context, *continuation] for context, continuation in requests]
        plan = list(
            batches(
                [tokens[:-1] for tokens in whole],
                tokens=self.limits.tokens,
                balance=self._balance,
            )
        )
        mine = plan[self._replica :: self._replicas]
        found: dict[int, Likelihood] = {}
        waiting: list[tuple[list[int], list[int], Tensor]] = []
        done, total = 0, sum(len(row.paths) for rows in mine for row in rows)
        for rows in mine:
            batch = Batch.of(rows)
            numbers = list(batch.paths)
            lengths = [len(requests[number][1]) for number in numbers]
            outputs = np.concatenate([batch.paths[n][-k:] for n, k in zip(numbers, lengths, strict=True)])
            targets = torch.tensor(
                [token for n, k in zip(numbers, lengths, strict=True) for token in whole[n][-k:]]
            ).to(self.device)
            read = partial(self._readings.scores, targets)
            scores = self._forward(batch.tokens, self._branches(batch, outputs, read))
            waiting.append((numbers, lengths, scores))
            done += len(numbers)
            progress(done, total)
        for numbers, lengths, scores in waiting:
            scores = self._from_last(scores, (sum(lengths), 2)).cpu()
            for number, part in zip(numbers, scores.split(lengths), strict=True):
                found[number] = Likelihood(float(part[:, 0].sum()), bool(part[:, 1].all()))
        return self._of_all(found, len(requests))

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        stop: Callable[[int, list[int]], bool],
        most: Sequence[int],
        progress: Progress = lambda done, total: None,
        choose: Choose | None = None,
    ) -> list[list[int]]:
        """Continue prompts.

        Args:
            prompts: Token ids, none empty.
            stop: Is given a prompt's number and what was generated so far, and says whether that is all. It must say
                the same on every rank.
            most: Tokens to generate at most, by prompt.
            progress: As in `log_likelihoods`.
            choose: Is given prompts' numbers and their logits, [prompts, vocabulary] fp32, and returns the token of
                each, -1 where a logit is not a number; None for the likeliest token. Not with tensor ranks, of which
                each has a part of the vocabulary.

        Returns:
            The tokens generated after each prompt. Where a logit was not a number, -1 ends them.
        """
        if choose is not None and self._tensor.size() > 1:
            raise ConfigError(
                "Tensor ranks do not draw tokens.",
                where="parallel.tensor",
                found=self._tensor.size(),
                expected="1, or the likeliest tokens",
            )
        plan = list(
            batches(
                prompts,
                tokens=self.limits.tokens,
                balance=self._balance,
                sequences_at_once=self.limits.sequences,
            )
        )
        mine = plan[self._replica :: self._replicas]
        found: dict[int, list[int]] = {}
        total = sum(len(row.paths) for rows in mine for row in rows)
        for rows in mine:
            found |= self._continue(rows, prompts, stop, most, choose)
            progress(len(found), total)
        return self._of_all(found, len(prompts))

    @torch.inference_mode()
    def token_scores(
        self, sequences: Sequence[Sequence[int]], progress: Progress = lambda done, total: None
    ) -> list[np.ndarray]:
        """What the model says of each token but the first.

        Args:
            sequences: Token ids, 2 to `max_sequence_length + 1` of each.
            progress: As in `log_likelihoods`.

        Returns:
            float64 [length - 1, 3] of each: the token's log-probability, and mean and standard deviation of the
            log-probability of a token drawn from the model there. Nats.
        """
        plan = list(
            batches([one[:-1] for one in sequences], tokens=self.limits.tokens, balance=self._balance)
        )
        mine = plan[self._replica :: self._replicas]
        found: dict[int, np.ndarray] = {}
        waiting = []
        total = sum(len(row.paths) for rows in mine for row in rows)
        for rows in mine:
            batch = Batch.of(rows)
            numbers = list(batch.paths)
            outputs = np.concatenate([batch.paths[n] for n in numbers])
            targets = torch.tensor([t for n in numbers for t in sequences[n][1:]]).to(self.device)
            read = partial(self._readings.moments, targets)
            waiting.append((numbers, self._forward(batch.tokens, self._branches(batch, outputs, read))))
            progress(sum(len(numbers) for numbers, _ in waiting), total)
        for numbers, scores in waiting:
            lengths = [len(sequences[n]) - 1 for n in numbers]
            scores = self._from_last(scores, (sum(lengths), 3)).cpu()
            for number, part in zip(numbers, scores.split(lengths), strict=True):
                found[number] = part.numpy()
        return self._of_all(found, len(sequences))

    @torch.inference_mode()
    def last_states(
        self, sequences: Sequence[Sequence[int]], progress: Progress = lambda done, total: None
    ) -> np.ndarray:
        """The state at the last token of each sequence, after the last norm: float64 [sequences, hidden].

        Args:
            sequences: Token ids, none empty, at most `max_sequence_length` of each; there may be none.
            progress: As in `log_likelihoods`.
        """
        plan = list(batches(sequences, tokens=self.limits.tokens, balance=self._balance))
        found: dict[int, np.ndarray] = {}
        total = len(sequences)
        for rows in plan[self._replica :: self._replicas]:
            batch = Batch.of(rows)
            outputs = np.array([path[-1] for path in batch.paths.values()])
            branches = self._branches(batch, outputs, lambda states, first: states.double())
            branches.states = True
            states = self._forward(batch.tokens, branches)
            states = self._from_last(states, (len(outputs), self.model.hidden_size)).cpu()
            found |= dict(zip(batch.paths, states.numpy(), strict=True))
            progress(len(found), total)
        rows_of_all = self._of_all(found, total)
        return np.stack(rows_of_all) if total else np.empty((0, self.model.hidden_size))

    def _of_all(self, found: dict[int, Any], count: int) -> list[Any]:
        """What all replicas have found, by number."""
        everywhere = gather_objects(found) if self._replicas > 1 else [found]
        merged = {number: one for part in everywhere for number, one in part.items()}
        return [merged[number] for number in range(count)]

    def _begin(
        self, rows: Sequence[Row], prompts: Sequence[Sequence[int]], choose: Choose | None
    ) -> tuple[list[int], Tensor, KeyValueCache]:
        """Prompts' numbers in the cache's order, the first token after each, [prompts, 1], and keys and values."""
        columns = max(len(prompts[number]) for row in rows for number in row.paths)
        order: list[int] = []
        firsts, caches = [], []
        for part in alike(rows, pass_costs=_PASS):
            batch = Batch.of(part)
            numbers = list(batch.paths)
            keep = np.zeros((len(numbers), columns), np.int64)
            for place, number in enumerate(numbers):
                keep[place, columns - len(prompts[number]) :] = batch.paths[number]
            outputs = np.array([batch.paths[number][-1] for number in numbers])
            branches = self._branches(batch, outputs, self._choosing(choose, numbers))
            branches.keep, branches.cache = torch.from_numpy(keep).to(self.device), KeyValueCache(columns)
            firsts.append((len(numbers), self._forward(batch.tokens, branches)))
            caches.append(branches.cache)
            order += numbers
        # Pipeline ranks have all of the prompts under way before one waits for the last.
        chosen = [self._from_last(first, (count, 1), torch.int64) for count, first in firsts]
        return order, torch.cat(chosen), KeyValueCache.joined(caches)

    def _continue(
        self,
        rows: Sequence[Row],
        prompts: Sequence[Sequence[int]],
        stop: Callable[[int, list[int]], bool],
        most: Sequence[int],
        choose: Choose | None,
    ) -> dict[int, list[int]]:
        alive, chosen, cache = self._begin(rows, prompts, choose)
        generated: dict[int, list[int]] = {number: [] for number in alive}
        before = torch.tensor([cache.used - len(prompts[number]) for number in alive])
        while True:
            going = []
            for row, (number, (token,)) in enumerate(zip(alive, chosen.tolist(), strict=True)):
                so_far = generated[number]
                so_far.append(token)
                if token >= 0 and len(so_far) < most[number] and not stop(number, so_far):
                    going.append(row)
            if not going:
                return generated
            if len(going) < len(alive):
                kept = torch.tensor(going)
                cache.select(kept.to(self.device))
                before, alive = before[kept], [alive[row] for row in going]
            tokens = np.array([[generated[number][-1]] for number in alive])
            branches = self._next(cache, before, len(alive), self._choosing(choose, alive))
            chosen = self._from_last(self._forward(tokens, branches), (len(alive), 1), torch.int64)

    def _next(self, cache: KeyValueCache, before: Tensor, sequences: int, read: _Read) -> Branches:
        """One more token behind every sequence of a cache, of which the first `before` columns are empty."""
        sees = None
        if bool(before.any()):
            sees = torch.arange(cache.used + 1) >= before[:, None]
            sees = sees[:, None, None].to(self.device)
        return Branches(
            positions=(cache.used - before)[:, None].to(self.device),
            sees=sees,
            outputs=torch.arange(sequences, device=self.device),
            read=read,
            at_once=self._at_once,
            cache=cache,
        )

    def _branches(self, batch: Batch, outputs: np.ndarray, read: _Read) -> Branches:
        device = self.device
        return Branches(
            positions=torch.from_numpy(batch.positions).to(device),
            sees=None if batch.sees is None else torch.from_numpy(batch.sees)[:, None].to(device),
            outputs=torch.from_numpy(outputs).to(device),
            read=read,
            at_once=self._at_once,
        )

    @property
    def _at_once(self) -> int:
        return max(1, _LOGITS * self._tensor.size() // self.model.vocab_size)

    def _forward(self, tokens: np.ndarray, branches: Branches) -> Tensor:
        """What the last pipeline rank read, on that rank; elsewhere something else."""
        rows, length = tokens.shape
        device, group = self.device, self._pipeline
        rank = group.rank()
        if not self._first:
            hidden = torch.empty(length, rows, self.model.hidden_size, dtype=self._dtype, device=device)
            dist.recv(hidden, group=group, group_src=rank - 1)
            self.chunk.set_input_tensor(hidden)
        ids = torch.from_numpy(tokens).to(device)
        out: Tensor = self.chunk(ids, None, None, packed_seq_params=branches)
        if not self._last:
            dist.send(out.contiguous(), group=group, group_dst=rank + 1)
        if branches.cache is not None and branches.keep is None:
            branches.cache.advance()
        return out

    def _from_last(self, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
        """What the last pipeline rank has, on all of them."""
        if self._pipeline.size() == 1:
            return value
        box = value if self._last else torch.empty(shape, dtype=dtype, device=self.device)
        dist.broadcast(box, group=self._pipeline, group_src=self._pipeline.size() - 1)
        return box

    def _choosing(self, choose: Choose | None, numbers: list[int]) -> _Read:
        if choose is None:
            return self._readings.likeliest
        return lambda logits, first: choose(numbers[first : first + len(logits)], logits.float())[:, None]
