"""Multiple choice of the local suite, asked of the model that is being trained, beside its held-out loss.

The items are those of `davinci eval --suite local`, and so are the scores: the same options, the same tokens, the
same forward pass. So is the geometry of the states at the ends of the same texts. lm-eval has no part in it. What is
generated, and other tasks, are for `davinci eval --follow`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from megatron_davinci.config import RunConfig
from megatron_davinci.data.places import S3Options
from megatron_davinci.data.run_tokenizer import manifests, run_tokenizer
from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.errors import DataError
from megatron_davinci.evaluate.engine import Engine
from megatron_davinci.evaluate.geometry import geometry, probe
from megatron_davinci.evaluate.local import LocalTask, local_tasks
from megatron_davinci.evaluate.texts import held_out_texts, pairs_of, spaces_moved

# Held-out texts for each item: not every text is good for every kind.
_TEXTS = 4


class Asked(NamedTuple):
    """A task, encoded.

    Attributes:
        name: Of the task.
        answers: [items], the place of the right option.
        lengths: [items, options], characters of each option.
        pairs: Tokens before and of each option, item by item.
    """

    name: str
    answers: np.ndarray
    lengths: np.ndarray
    pairs: list[tuple[list[int], list[int]]]


class InLoopTasks:
    """Items made once from the run's held-out sources: the same at every evaluation, and for every seed.

    Args:
        config: The run configuration; `evaluation.tasks` items of each kind and domain.

    Raises:
        DataError: The held-out texts give no item.
    """

    def __init__(self, config: RunConfig) -> None:
        assert config.data.tokenizer is not None, "the configuration was checked"
        self._config = config
        wanted, tokenizer = (
            config.evaluation.tasks,
            run_tokenizer(config.data.tokenizer, manifests(config.data).values()),
        )
        texts = held_out_texts(
            config.data.validation,
            S3Options(**dict(config.data.s3)),
            tokenizer,
            config.data.sequence_length,
            _TEXTS * wanted,
        )
        self._probe = probe(tokenizer, texts, config.model.max_sequence_length)
        made = [task for task in local_tasks(texts, wanted) if task.protocol == "likelihood"]
        encoded = [_encoded(task, tokenizer, config.model.max_sequence_length) for task in made]
        self.tasks = [task for task in encoded if len(task.answers)]
        if not self.tasks:
            raise DataError(
                "The held-out sources give no item to ask.",
                where="evaluation.tasks",
                found=f"{sum(map(len, texts.values())):,} texts, {len(made)} kinds of items longer than the model",
                do="give longer held-out texts or a longer model, or leave evaluation.tasks at 0",
            )

    def ask(self, chunk: Any) -> dict[str, dict[str, Any]]:
        """Score the model as it is; every rank calls this, and is given the same.

        Args:
            chunk: This rank's part of the model, which is trained on afterwards.

        Returns:
            By task: `items`, `acc` and `acc_norm` (options by their log-likelihood, as it is and a character) with
            `acc_stderr` and `acc_norm_stderr`; `problem` in place of scores where logits are not numbers. As
            `geometry`: `rank_me` and `alpha_req` of `items` texts' last states, as `evaluate.geometry` has them.
        """
        device = next(chunk.parameters()).device
        engine = Engine(chunk, self._config.model, device, trained=True)
        try:
            logs = [one.log for one in engine.log_likelihoods([p for task in self.tasks for p in task.pairs])]
            states = engine.last_states(self._probe)
        finally:
            chunk.train()
        found, first = {}, 0
        for task in self.tasks:
            sums = np.array(logs[first : first + len(task.pairs)]).reshape(task.lengths.shape)
            first += len(task.pairs)
            found[task.name] = _scores(task, sums)
        return found | {"geometry": _shape(states)}


def _shape(states: np.ndarray) -> dict[str, Any]:
    try:
        shape = geometry(states)
    except DataError as error:
        return {"items": len(states), "problem": str(error.found)}
    measured = {"rank_me": shape.rank_me, "alpha_req": shape.alpha_req}
    return {"items": shape.sequences, **{name: value for name, value in measured.items() if value == value}}


def _scores(task: Asked, sums: np.ndarray) -> dict[str, Any]:
    scores: dict[str, Any] = {"items": len(task.answers)}
    bad = int((~np.isfinite(sums)).any(1).sum())
    if bad:
        return scores | {"problem": f"{bad} of {len(sums)} items have logits that are not numbers"}
    for name, values in (("acc", sums), ("acc_norm", sums / task.lengths)):
        right = values.argmax(1) == task.answers
        scores[name] = float(right.mean())
        if len(right) > 1:
            scores[f"{name}_stderr"] = float(right.std(ddof=1) / np.sqrt(len(right)))
    return scores


def _encoded(task: LocalTask, tokenizer: Tokenizer, longest: int) -> Asked:
    shown = "".join(one["text"] + one["options"][one["answer"]] + "\n\n" for one in task.examples)
    moved = [spaces_moved(shown + item["text"], option) for item in task.items for option in item["options"]]
    pairs = list(pairs_of(tokenizer, moved))
    answers, lengths, kept = [], [], []
    number = 0
    for item in task.items:
        of_item = pairs[number : number + len(item["options"])]
        number += len(of_item)
        if all(before and 0 < len(rest) <= longest for before, rest in of_item):
            # What is too long loses its beginning, as in `davinci eval`.
            kept += [(before[-(longest + 1 - len(rest)) :], rest) for before, rest in of_item]
            answers.append(item["answer"])
            lengths.append([len(option) for option in item["options"]])
    return Asked(task.name, np.array(answers), np.array(lengths, np.float64), kept)
