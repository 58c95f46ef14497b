"""What ranks do for the tests of evaluation: lm-eval's tasks on a checkpoint, on one layout after the other."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from megatron_davinci.cli.convert_to_hf import find

TASKS = ("tiny_choice", "tiny_text", "tiny_generation")


def offline(cache: Path) -> None:
    """Nothing is fetched, and what datasets makes of the files stays with the test."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache)}


def answers_of(samples: dict[str, list[dict[str, Any]]]) -> dict[str, list[Any]]:
    """By task, what was answered to each item, in their order."""
    return {name: [one["answers"] for one in rows] for name, rows in samples.items()}


def layouts(run: Path, tasks: Path, cache: Path, wanted: list[list[str]]) -> list[dict[str, Any]]:
    """The answers of all tasks on each layout, on these ranks; rank 0 has them."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_davinci.cli.eval_model import on_ranks, tokenizer_for
    from megatron_davinci.evaluate.ranks import Leader, follow
    from megatron_davinci.platform import distributed

    offline(cache)
    found = find(str(run))
    tokenizer = tokenizer_for(found, None)
    stop, answers = distributed.stop, []
    try:
        distributed.stop = parallel_state.destroy_model_parallel  # the ranks stay for the next layout
        for overrides in wanted:
            world = int(os.environ["WORLD_SIZE"])
            # Small, so that there are several batches for replicas to share.
            with on_ranks(found, [*overrides, "train.threads=1"], tokenizer, world, 512) as measured:
                if dist.get_rank() != 0:
                    follow(measured.engine, tokenizer)
                    continue
                with Leader(measured.engine, tokenizer) as leader:
                    answers.append(_answers(leader, tokenizer, measured.identity, tasks))
    finally:
        distributed.stop = stop
        stop()
    return answers


def _answers(leader: Any, tokenizer: Any, identity: dict[str, Any], folder: Path) -> dict[str, Any]:
    from megatron_davinci.evaluate.answers import Answers
    from megatron_davinci.evaluate.harness import NativeLM
    from megatron_davinci.evaluate.tasks import Tasks, run_task

    tasks, samples = Tasks([folder]), {}
    lm = NativeLM(leader, tokenizer, identity["length"], Answers(None, identity))
    for name in TASKS:
        result = run_task(lm, name, partial(tasks.manager(name).load, [name]), bootstrap=0)
        assert result.problem is None, result.problem
        samples |= result.samples
    return answers_of(samples)


def alone_and_poisoned(run: Path) -> dict[str, Any]:
    """Requests together and one by one; then the same of a model with a weight that is no number."""
    import numpy as np
    import torch

    from megatron_davinci.cli.eval_model import on_ranks, tokenizer_for

    found = find(str(run))
    tokenizer = tokenizer_for(found, None)
    generator = np.random.default_rng(3)
    prompts = [generator.integers(0, 300, int(n)).tolist() for n in generator.integers(1, 40, 9)]
    requests = [(prompt, rest) for prompt in prompts for rest in ([5], [5, 6], [5, 7, 8], [9])]
    with on_ranks(found, ["train.threads=1"], tokenizer, 1, 512) as measured:
        engine = measured.engine

        def never(number: int, ids: list[int]) -> bool:
            return False

        together = engine.log_likelihoods(requests)
        alone = [engine.log_likelihoods([request])[0] for request in requests]
        most = [3 + number % 5 for number in range(len(prompts))]
        generated = engine.generate(prompts, never, most)
        # Each token is the likeliest after all before it, computed anew without a cache.
        again = [
            engine.log_likelihoods([(prompt, ids)])[0].greedy
            for prompt, ids in zip(prompts, generated, strict=True)
        ]
        moments = engine.token_scores(
            [[*prompt, *ids] for prompt, ids in zip(prompts, generated, strict=True)]
        )
        logits = [
            measured.engine.chunk(torch.tensor([[*prompt, *ids][:-1]]), None, None)[0]
            .detach()
            .double()
            .numpy()
            for prompt, ids in zip(prompts, generated, strict=True)
        ]
        with torch.no_grad():
            next(iter(engine.chunk.parameters()))[5].fill_(float("nan"))
        poisoned = engine.log_likelihoods(requests)
        ended = engine.generate(prompts, never, most)
    return {
        "together": together,
        "alone": alone,
        "generated": generated,
        "most": most,
        "greedy": again,
        "moments": moments,
        "logits": [one[:, : tokenizer.vocab_size] for one in logits],
        "sequences": [[*prompt, *ids] for prompt, ids in zip(prompts, generated, strict=True)],
        "poisoned": poisoned,
        "ended": ended,
        "no_states": engine.last_states([]).shape,
    }
