"""Trouble planted in a run on the ranks of the pool: samples that are poison, ranks that miscompute, that die."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from tests.tiny import train_here

_POISON = (250, 3, 250, 3, 250)


def train_planted(settings: dict[str, Any], **plant: Any) -> int:
    """`train_here`, with

    Args:
        settings: Of the run.
        plant: `poison`: samples whose embedding is not a number. `noise`: samples whose tokens are drawn anew.
            `flip`: (rank, step, value): one element of this rank's gradient has that value, the first time that the
            step is taken. `weight`: (rank, step): one of its weights is not a number before the step. `die`: where
            rank 0 ends: `before` or `after` a skip is in the journal, or before the attempt of that number.
    """
    from megatron_davinci.train import loop
    from megatron_davinci.train.feed import Feed
    from megatron_davinci.train.order import DataOrder
    from megatron_davinci.train.step import Stepper

    rank = int(os.environ["RANK"])
    take, train, run = Feed.take, Stepper.train, Stepper._run
    pass_over, build = DataOrder.pass_over, loop.build_model
    poison, noise = set(plant.get("poison", ())), set(plant.get("noise", ()))
    attempts: list[int] = []
    begun: list[int] = []

    def planted_take(self: Feed, first_sample: int, batch: int, stage: int) -> Any:
        begun.append(first_sample)
        samples = take(self, first_sample, batch, stage)
        for row, number in enumerate(self.numbers(first_sample, batch)):
            if samples.tokens is not None and int(number) in poison:
                samples.tokens[row, : len(_POISON)] = torch.tensor(_POISON)
            if samples.tokens is not None and int(number) in noise:
                drawn = np.random.default_rng(int(number)).integers(0, 256, samples.tokens.shape[1])
                samples.tokens[row] = torch.from_numpy(drawn)
        return samples

    def poisoned(module: Any, args: Any, keywords: Any, output: Any) -> Any:
        tokens = keywords.get("input_ids", args[0] if args else None)
        rows = (tokens[:, : len(_POISON)] == torch.tensor(_POISON)).all(1)
        return torch.where(rows[None, :, None], output * float("nan"), output) if rows.any() else output

    def planted_build(config: Any, platform: Any) -> Any:
        chunks = build(config, platform)
        for chunk in chunks:
            if getattr(chunk, "embedding", None) is not None:
                chunk.embedding.register_forward_hook(poisoned, with_kwargs=True)
        return chunks

    def planted_train(self: Stepper, *args: Any, **keywords: Any) -> Any:
        attempts.append(len(begun))
        if plant.get("die") == len(attempts) and rank == 0:
            os._exit(9)
        if "weight" in plant and plant["weight"] == (rank, len(begun)) and attempts.count(len(begun)) == 1:
            next(iter(self.wrapped[0].module.parameters())).data.view(-1)[3] = float("nan")
        return train(self, *args, **keywords)

    def planted_run(self: Stepper, *args: Any, **keywords: Any) -> Any:
        answer = run(self, *args, **keywords)
        if "flip" in plant and not keywords["forward_only"]:
            at, step, value = plant["flip"]
            if at == rank and step == len(begun) and attempts.count(step) == 1:
                # In every parameter, so that it lies in this rank's own shard of one of them.
                for parameter in self.wrapped[0].module.parameters():
                    parameter.main_grad.view(-1)[:] = value
        return answer

    def planted_pass_over(self: DataOrder, *args: Any) -> None:
        if plant.get("die") == "before" and rank == 0:
            os._exit(9)
        pass_over(self, *args)
        if plant.get("die") == "after" and rank == 0:
            os._exit(9)

    Feed.take, Stepper.train, Stepper._run = planted_take, planted_train, planted_run
    DataOrder.pass_over, loop.build_model = planted_pass_over, planted_build
    return train_here(settings)


def planted(settings: dict[str, Any], plant: dict[str, Any]) -> int:
    """As `train_planted`, for `run_ranks`."""
    return train_planted(settings, **plant)
