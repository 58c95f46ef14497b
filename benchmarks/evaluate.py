"""Items a second of `davinci eval`'s model against lm-eval's own `hf` model: same weights, requests and process.

    python benchmarks/evaluate.py --json FILE

A model of 3M random parameters becomes a checkpoint and its export. An lm-eval task of multiple choice with three
examples before each question, and one of generation, are built from random words; lm-eval makes their requests once.
Both models answer the same requests, one after the other and again in the opposite order, and the better time of each
counts. `hf` is given the batch size of several that is fastest on the first requests.

`multiple_choice_speedup` and `generation_speedup` are hf's seconds over ours; `max_loglikelihood_difference` is over
all requests of multiple choice, in nats; `generation_same` is the share of greedy continuations that are the same.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

BATCH_SIZES = (4, 16)
LAYOUT = {
    "num_layers": 6,
    "hidden_size": 192,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "ffn_hidden_size": 512,
    "max_sequence_length": 512,
}
VOCABULARY = 4096


def main() -> int:
    """Measure."""
    parser = common.parser(__doc__)
    parser.add_argument("--items", type=int, default=32, help="of multiple choice")
    parser.add_argument("--prompts", type=int, default=16, help="of generation, each with 48 new tokens")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(prefix="davinci-evaluate-") as root:
        os.environ["HF_DATASETS_CACHE"] = f"{root}/cache"
        figures, peer = measure(Path(root), given.items, given.prompts, given.seed)
    common.write(given.json, figures, peer)
    return 0


def measure(root: Path, items: int, prompts: int, seed: int) -> tuple[dict[str, float], dict[str, Any]]:
    """All figures, and those of the peer."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    logging.disable(logging.WARNING)
    run = write(root, items, prompts, seed)

    from megatron_davinci.cli.convert_to_hf import export, find
    from megatron_davinci.cli.eval_model import on_ranks, tokenizer_for

    export(str(run), root / "hf", verify=False)
    found = find(str(run))
    tokenizer = tokenizer_for(found, None)
    with on_ranks(found, ["train.precision=fp32"], tokenizer, 1, 4096) as measured:
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        from megatron_davinci.evaluate.answers import Answers
        from megatron_davinci.evaluate.harness import NativeLM
        from megatron_davinci.evaluate.ranks import Leader

        manager = TaskManager(include_path=str(root / "tasks"), include_defaults=False)
        requests = {}
        for name, task in manager.load(["choice", "generation"])["tasks"].items():
            task.set_fewshot_seed(1234)
            task.build_all_requests()
            requests[name] = task.instances
        theirs = HFLM(pretrained=str(root / "hf"), device="cpu", dtype="float32", batch_size=1)
        leader = Leader(measured.engine, tokenizer)

        def ours() -> Any:
            return NativeLM(leader, tokenizer, measured.config.model.max_sequence_length, Answers(None, {}))

        size = fastest(theirs, requests["choice"][:32])
        theirs.batch_size_per_gpu = size
        choice = race(
            lambda: ours().loglikelihood(requests["choice"], disable_tqdm=True),
            lambda: theirs.loglikelihood(requests["choice"], disable_tqdm=True),
        )
        theirs.batch_size_per_gpu = prompts  # all of them, as ours
        generation = race(
            lambda: ours().generate_until(requests["generation"], disable_tqdm=True),
            lambda: theirs.generate_until(requests["generation"], disable_tqdm=True),
        )
    (our_choice, our_answers), (their_choice, their_answers) = choice
    (our_generation, our_texts), (their_generation, their_texts) = generation
    figures = {
        "multiple_choice_speedup": their_choice / our_choice,
        "generation_speedup": their_generation / our_generation,
        "max_loglikelihood_difference": max(
            abs(one[0] - other[0]) for one, other in zip(our_answers, their_answers, strict=True)
        ),
        "generation_same": sum(map(str.__eq__, our_texts, their_texts)) / len(our_texts),
        "multiple_choice_items_per_second": items / our_choice,
        "generated_texts_per_second": prompts / our_generation,
    }
    peer = {
        "name": "lm-eval's hf model, fp32",
        "batch_size": size,
        "multiple_choice_items_per_second": items / their_choice,
        "generated_texts_per_second": prompts / their_generation,
    }
    return figures, peer


def fastest(model: Any, requests: list[Any]) -> int:
    """The batch size at which these requests are answered soonest."""
    seconds = {}
    for size in BATCH_SIZES:
        model.batch_size_per_gpu = size
        seconds[size] = timed(lambda: model.loglikelihood(requests, disable_tqdm=True))[0]
    return min(seconds, key=lambda size: seconds[size])


def race(ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[tuple[float, Any], tuple[float, Any]]:
    """The better of two times of each, in both orders."""
    first = timed(ours), timed(theirs)
    second_theirs, second_ours = timed(theirs), timed(ours)
    return min(first[0], second_ours, key=lambda one: one[0]), min(
        first[1], second_theirs, key=lambda one: one[0]
    )


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came out."""
    began = time.perf_counter()
    result = action()
    return time.perf_counter() - began, result


def write(root: Path, items: int, prompts: int, seed: int) -> Path:
    """A run of one checkpoint, its tokenizer, and the two tasks."""
    import numpy as np
    import yaml

    from megatron_davinci.data.tokenizer import train_bpe
    from tests.config import small
    from tests.evaluate.models import _save
    from tests.ranks import run_ranks

    generator = np.random.default_rng(seed)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    words = ["".join(generator.choice(letters, int(n))) for n in generator.integers(2, 9, 6000)]

    def text(least: int, most: int) -> str:
        return " ".join(generator.choice(words, int(generator.integers(least, most + 1))))

    lines = [json.dumps({"text": text(20, 60)}) for _ in range(3000)]
    (root / "text.jsonl").write_text("\n".join(lines) + "\n")
    train_bpe([root / "text.jsonl"], VOCABULARY, root / "tokenizer")
    settings = small.settings(
        model={**LAYOUT, "vocab_size": VOCABULARY},
        data={"sequence_length": 512, "tokenizer": str(root / "tokenizer")},
    )
    (root / "run").mkdir()
    (root / "run/config.yaml").write_text(yaml.safe_dump(settings))
    run_ranks(1, _save, settings, root / "run/checkpoints")
    (root / "tasks").mkdir()
    questions = [
        {
            "question": text(12, 25),
            "choices": [text(2, 6) for _ in range(4)],
            "answer": int(generator.integers(4)),
        }
        for _ in range(items)
    ]
    starts = [{"question": text(30, 80), "choices": ["a"], "answer": 0} for _ in range(prompts)]
    for name, rows in (("choice", questions), ("generation", starts)):
        (root / f"tasks/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(root / f"tasks/{name}.jsonl")}},
            "test_split": "test",
            "fewshot_split": "test",
        }
        if name == "choice":
            task |= {
                "output_type": "multiple_choice",
                "num_fewshot": 3,
                "doc_to_text": "Question: {{question}}\nAnswer:",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "answer",
                "metric_list": [{"metric": "acc"}],
            }
        else:
            task |= {
                "output_type": "generate_until",
                "doc_to_text": "{{question}}",
                "doc_to_target": "{{choices[0]}}",
                "generation_kwargs": {"until": ["never said"], "max_gen_toks": 48},
                "metric_list": [{"metric": "exact_match"}],
            }
        (root / f"tasks/{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    return root / "run"


if __name__ == "__main__":
    raise SystemExit(main())
