"""Suites: which tasks, how each is put, and what is averaged.

`davinci19` is the protocol of daVinci-LLM (arXiv 2603.27164): 19 benchmarks, each by likelihood or by generation,
with its number of examples, greedy; three groups; and an overall that is the mean over the 19, not over the groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_davinci.evaluate.both_ways import FILTER

GROUPS = ("General", "Code", "Science")


@dataclass(frozen=True)
class Entry:
    """A benchmark of a suite.

    Attributes:
        name: As the suite calls it.
        group: What it is averaged with.
        protocol: `likelihood` or `generation`.
        shots: Examples before each item.
        task: lm-eval's name of it.
        folders: Of lm-eval's tasks that have it; where one begins with `davinci19` it is ours. None of a code task.
        metric: What counts, as lm-eval names it.
        data: Its data sets on the hub.
        turned: Whether lm-eval has it by likelihood, and it is turned into generation.
        code: Whether it runs what a model wrote.
        note: What a user has to know to get it.
    """

    name: str
    group: str
    protocol: str
    shots: int
    task: str
    folders: tuple[str, ...]
    metric: str
    data: tuple[str, ...]
    turned: bool = False
    code: bool = False
    note: str = ""


_LETTER = f"exact_match,{FILTER}"
_PASSED = "pass@1,sandbox"
_AGIEVAL = tuple(
    f"hails/agieval-{name}"
    for name in (
        "aqua-rat", "gaokao-english", "logiqa-en", "lsat-ar", "lsat-lr", "lsat-rc", "math",
        "sat-en", "sat-en-without-passage", "sat-math",
    )
)  # fmt: skip

DAVINCI19 = (
    Entry("MMLU", "General", "likelihood", 5, "mmlu", ("mmlu/default",), "acc,none", ("cais/mmlu",)),
    Entry(
        "MMLU-Pro", "General", "generation", 5, "mmlu_pro", ("mmlu_pro",), "exact_match,custom-extract",
        ("TIGER-Lab/MMLU-Pro",),
    ),
    Entry(
        "AGIEval-EN", "General", "generation", 0, "agieval_en", ("agieval",), _LETTER, _AGIEVAL, turned=True
    ),
    Entry(
        "HellaSwag", "General", "generation", 0, "hellaswag", ("hellaswag",), _LETTER, ("Rowan/hellaswag",),
        turned=True,
    ),
    Entry(
        "TriviaQA", "General", "generation", 5, "triviaqa", ("triviaqa",), "exact_match,remove_whitespace",
        ("mandarjoshi/trivia_qa",),
    ),
    Entry("RACE", "General", "generation", 0, "race", ("race",), _LETTER, ("EleutherAI/race",), turned=True),
    Entry(
        "WinoGrande", "General", "generation", 0, "winogrande", ("winogrande",), _LETTER,
        ("allenai/winogrande",), turned=True,
    ),
    Entry(
        "OpenBookQA", "General", "likelihood", 5, "openbookqa", ("openbookqa",), "acc_norm,none",
        ("allenai/openbookqa",),
    ),
    Entry("PIQA", "General", "likelihood", 0, "piqa", ("piqa",), "acc,none", ("baber/piqa",)),
    Entry(
        "HumanEval", "Code", "generation", 0, "humaneval", (), _PASSED,
        ("openai/openai_humaneval",), code=True,
    ),
    Entry(
        "EvalPlus", "Code", "generation", 0, "humaneval_plus", (), _PASSED,
        ("evalplus/humanevalplus",), code=True,
    ),
    Entry(
        "MBPP", "Code", "generation", 3, "mbpp", (), _PASSED,
        ("google-research-datasets/mbpp",), code=True,
    ),
    Entry(
        "GSM8K", "Science", "generation", 8, "gsm8k", ("gsm8k",), "exact_match,flexible-extract",
        ("openai/gsm8k",),
    ),
    Entry(
        "GSM-Plus", "Science", "generation", 5, "gsm_plus", ("gsm_plus",), "exact_match,flexible-extract",
        ("qintongli/GSM-Plus",),
    ),
    Entry(
        "MATH", "Science", "generation", 4, "davinci19_math", ("minerva_math", "davinci19"),
        "exact_match,none", ("EleutherAI/hendrycks_math",), note="pip install 'lm-eval[math]'",
    ),
    Entry(
        "GPQA-Main", "Science", "likelihood", 5, "gpqa_main_n_shot", ("gpqa/n_shot",), "acc,none",
        ("Idavidrein/gpqa",), note="accept its terms on the hub with your account, then `hf auth login`",
    ),
    Entry(
        "SuperGPQA", "Science", "generation", 5, "davinci19_supergpqa", ("davinci19",), _LETTER,
        ("m-a-p/SuperGPQA",), turned=True,
    ),
    Entry(
        "MMLU-STEM", "Science", "likelihood", 5, "mmlu_stem", ("mmlu/default",), "acc,none", ("cais/mmlu",)
    ),
    Entry(
        "MMLU-Pro-STEM", "Science", "generation", 5, "davinci19_mmlu_pro_stem", ("mmlu_pro", "davinci19"),
        "exact_match,custom-extract", ("TIGER-Lab/MMLU-Pro",),
    ),
)  # fmt: skip


def averages(entries: Sequence[Entry], scores: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Means by group and over all, in percent.

    Args:
        entries: The suite's.
        scores: In [0, 1], of those that came to something, by name.

    Returns:
        By group, and `Overall`: `score`, `of` (how many of its benchmarks it is the mean of) and `missing` (the
        others). The score is None where none came to something. A mean of some of them is no figure to compare with
        one of all, which is what `missing` is for.
    """
    found = {}
    for group in (*GROUPS, "Overall"):
        members = [entry.name for entry in entries if group in (entry.group, "Overall")]
        there = [scores[name] for name in members if name in scores]
        found[group] = {
            "score": 100 * sum(there) / len(there) if there else None,
            "of": len(there),
            "missing": [name for name in members if name not in scores],
        }
    return found


def how_to_get(entry: Entry) -> str:
    """What to type for a benchmark's data."""
    commands = "; ".join(f"hf download --repo-type dataset {name}" for name in entry.data[:1])
    more = f" (and {len(entry.data) - 1} more like it)" if len(entry.data) > 1 else ""
    return f"{commands}{more}, or --download" + (f"; {entry.note}" if entry.note else "")
