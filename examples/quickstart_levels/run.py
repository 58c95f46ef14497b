"""Levels 6, 7 and 8 on the quickstart's corpus with the quickstart's own model, and what holds of what came out.

    python examples/quickstart_levels/run.py                    after `make quickstart`
    python examples/quickstart_levels/run.py --url http://127.0.0.1:8000/v1 --model openai/gpt-oss-120b --prompts ours

It serves the newest export of the run by `davinci serve`, makes the corpus of levels.yaml, and then looks at every
document that was raised, by itself: quotations stand in the documents that they cite, checks run in the sandbox,
hold, and fail on the program made wrong, turns are what was chosen and pass their gates. The judge of dialogues is
asked about them with their answers exchanged too, which says what its YES is worth. With --url nothing is served, and
with --prompts ours the package's prompts take the place of those that are written for a context of 256 tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from megatron_davinci.cli.main import guarded
from megatron_davinci.cli.main import main as davinci
from megatron_davinci.darwin.choices import Choice, composed
from megatron_davinci.darwin.chunks import cut
from megatron_davinci.darwin.context_gates import CITATION
from megatron_davinci.darwin.converse import says_yes
from megatron_davinci.darwin.corpus import Corpus
from megatron_davinci.darwin.dialogue_gates import Turn, dialogue_violations, turn_violations, written
from megatron_davinci.darwin.endpoint import Client, Endpoint, Trouble
from megatron_davinci.darwin.forms import YES_OR_NO
from megatron_davinci.darwin.lineage import events, find
from megatron_davinci.darwin.mutants import mutants
from megatron_davinci.darwin.pair_gates import quoted
from megatron_davinci.darwin.prompts import Prompt, mark_for
from megatron_davinci.darwin.trials import LIMITS
from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.files import write_atomically, write_json
from megatron_davinci.platform.trial import run_with_tests

HERE = Path(__file__).resolve().parent
STEPS = {6: "contextualise", 7: "write_checks", 8: "converse"}
# The package's prompts, and sizes for models with a long context, by step.
OURS: dict[str, dict[str, Any]] = {
    "relate": {"passages": 3, "size": 800},
    "contextualise": {"prompt": "contextualise", "chunk": 4096, "may_decline": True, "tries": 2},
    "write_checks": {"prompt": "checks_python", "longest_function": 4000, "tries": 2},
    "converse": {
        "prompt": "judge_dialogue", "agents": ["dialogue_student", "dialogue_teacher"], "turns": 6, "least_turns": 4,
        "passage": 4096, "longest_turn": 1500, "tries": 2,
    },
}  # fmt: skip


def main() -> int:
    """Serve, make the corpus, look at it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="of `make quickstart`")
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart-data"), help="its data")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart-levels"), help="folder to work in")
    parser.add_argument(
        "--url", help="of another server, up to and with /v1; without it the run's model is served"
    )
    parser.add_argument("--model", default="quickstart", help="as the server calls it")
    parser.add_argument("--key-variable", help="environment variable with the key")
    parser.add_argument("--structured", choices=("vllm", "sglang", "none"), default="vllm",
                        help="how the server is told the form of answers")  # fmt: skip
    parser.add_argument("--prompts", choices=("quickstart", "ours"), default="quickstart")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures here, as benchmarks do")
    return guarded(lambda: levels(parser.parse_args()))


def levels(given: argparse.Namespace) -> int:
    """As `main`, with what was given."""
    recipe = yaml.safe_load((HERE / "levels.yaml").read_text(encoding="utf-8"))
    given.out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(HERE / "prompts", given.out / "prompts", dirs_exist_ok=True)
    with asked(given) as url:
        endpoint = {"url": url, "model": given.model, "key_variable": given.key_variable}
        endpoint |= {"structured": None if given.structured == "none" else given.structured}
        path = given.out / "levels.yaml"
        made = with_endpoint(recipe, endpoint, given.data.resolve(), given.prompts == "ours")
        write_atomically(path, yaml.safe_dump(made, sort_keys=False, allow_unicode=True).encode())
        if code := davinci(["data", "run", str(path)]):
            return code
        corpus = Corpus.load(given.out / "corpus")
        [asks] = [step["converse"] for step in made["steps"] if isinstance(step, dict) and "converse" in step]
        found = looked_at(corpus)
        judge = asyncio.run(exchanged(corpus, Endpoint(**asks["endpoint"])))
    found["level 8"]["judge"] = judge
    write_json(given.out / "levels.json", found)
    show(found)
    if given.json is not None:
        figures(given.json, found)
    return davinci(["data", "report", str(corpus.folder)])


def with_endpoint(recipe: dict[str, Any], endpoint: dict[str, Any], data: Path, ours: bool) -> dict[str, Any]:
    """The recipe with its texts in a folder, one endpoint, and perhaps the package's prompts."""
    steps = []
    for step in recipe["steps"]:
        if isinstance(step, dict):
            [(kind, given)] = step.items()
            given = given | (OURS.get(kind, {}) if ours else {})
            if "endpoint" in given:
                tokens = {"max_tokens": 4096} if ours else {}
                given = given | {"endpoint": given["endpoint"] | tokens | endpoint}
            step = {kind: given}
        steps.append(step)
    sources = [
        source | {"paths": [str(data / path) for path in source["paths"]]} for source in recipe["sources"]
    ]
    return recipe | {"sources": sources, "steps": steps}


@contextmanager
def asked(given: argparse.Namespace) -> Iterator[str]:
    """The address of the model: the one that is given, or of the run's export behind our server."""
    if given.url is not None:
        yield given.url
        return
    exports = sorted((given.run / "hf").glob("step-*"))
    if not exports:
        raise EnvironmentProblem(
            "There is no export of the quickstart.",
            where=given.run / "hf",
            do="make quickstart; or name a --run",
        )
    command = [sys.executable, "-m", "megatron_davinci.cli.main", "serve", str(exports[-1]), "--port", "0",
               "--name", given.model, "train.threads=1"]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        first = server.stdout.readline()
        if "http" not in first:
            raise EnvironmentProblem(
                "The server did not start.", found=f"exit code {server.wait()}", do="see what it said above"
            )
        yield next(word for word in first.split() if word.startswith("http")).rstrip(",")
    finally:
        server.terminate()
        server.wait()


def looked_at(corpus: Corpus) -> dict[str, Any]:
    """What came of the documents by level, and whether what was raised holds.

    Returns:
        By level: `documents` of which the model was asked something, `raised`, `holding` of those, `counts` of what
        came of answers, and the shortest as `example`.
    """
    records = {record["id"]: record for record in corpus.records()}
    counts = json.loads((corpus.folder / "statistics.json").read_text(encoding="utf-8"))["counts"]
    found = {}
    for level, holds in {6: _quotes, 7: _checks, 8: _talks}.items():
        step = STEPS[level]
        raised = [record for record in records.values() if record["darwin"]["level"] == level]
        asked_about = [
            record
            for record in records.values()
            if record["source"] != "talks"
            and any(
                each["name"] == step and each.get("notes", {}).get("prompt_tokens")
                for each in record["darwin"]["operations"]
            )
        ]
        good = [record for record in raised if _told(record, step, level) and holds(record, records, corpus)]
        shown = min(raised, key=lambda record: len(record["text"]), default=None)
        found[f"level {level}"] = {
            "step": step,
            "documents": len(asked_about),
            "raised": len(raised),
            "holding": len(good),
            "counts": {key.partition("/")[2]: count for key, count in sorted(counts.items())
                       if key.startswith(f"{step}/") and not key.endswith("_tokens")},
            "example": None if shown is None else {"id": shown["id"], "text": shown["text"]},
        }  # fmt: skip
    return found


def _told(record: dict[str, Any], step: str, level: int) -> bool:
    """Whether its history says which step raised it, by which model and prompt, out of which file."""
    entry = next(each for each in reversed(record["darwin"]["operations"]) if each["name"] == step)
    notes = entry["notes"]
    return bool(
        entry["level"] == level
        and entry["model"]
        and (notes.get("prompt") or notes.get("judge"))
        and record["darwin"]["origin"]["path"]
    )


def _quotes(record: dict[str, Any], records: dict[str, Any], corpus: Corpus) -> bool:
    """Every citation names a document that was shown, and what stands before it is a quotation from there."""
    related = {each["id"]: each["text"] for each in record["related"]}
    [event] = [each for each in events(find([corpus], record["id"])) if each.entry["name"] == "contextualise"]
    added = [
        line for line in record["text"].split("\n") if "]]" in line and line not in event.before.split("\n")
    ]
    cited = [line.rpartition(" [[") for line in added]
    return bool(cited) and not CITATION.search(record["text"]) and all(
        quoted(said, related[name.rstrip("]")]) for said, _, name in cited
    )  # fmt: skip


def _checks(record: dict[str, Any], records: dict[str, Any], corpus: Corpus) -> bool:
    """The checks hold on the program, and one planted fault or more makes them fail."""
    program, _, checks = record["text"].partition("\n\n\n# Checks\n")
    if run_with_tests(program, checks, LIMITS).outcome != "passed":
        return False
    return any(run_with_tests(fault, checks, LIMITS).outcome != "passed" for fault in mutants(program, 8))


def _talks(record: dict[str, Any], records: dict[str, Any], corpus: Corpus) -> bool:
    """Every turn passes its gates against the passage that the dialogue is about, is what its choices give, where it
    is composed of some, and the whole passes too.
    """
    notes = record["darwin"]["operations"][-1]["notes"]
    settings, turns = _settings(corpus), [Turn(**turn) for turn in record["turns"]]
    about = _passage(record, records, settings["passage"])
    speakers = list(dict.fromkeys(turn.speaker for turn in turns))
    choices = [agent.get("choice") for agent in settings["agents"]]
    for place, calls in enumerate(notes.get("composed_of", [])):
        choice = choices[place % len(choices)]
        if (calls is None) != (choice is None):
            return False
        if calls is not None and composed(Choice(**choice), about, calls) != turns[place].text:
            return False
    return not dialogue_violations(turns, about, speakers, 2) and not any(
        turn_violations(turn.text, about, turns[:place], speakers) for place, turn in enumerate(turns)
    )


def _settings(corpus: Corpus) -> dict[str, Any]:
    """Of the step that made dialogues."""
    [found] = [each["settings"] for each in corpus.manifest["operations"] if each["name"] == "converse"]
    return dict(found)


def _passage(record: dict[str, Any], records: dict[str, Any], size: int) -> str:
    """What a dialogue is about."""
    notes = record["darwin"]["operations"][-1]["notes"]
    passages = [chunk.text for chunk in cut(records[notes["of"]]["text"], size) if chunk.text]
    return passages[notes["passage"]]


async def exchanged(corpus: Corpus, endpoint: Endpoint) -> dict[str, int]:
    """Whether the judge knows right answers from others: it is asked about the dialogues that it let pass once more,
    each with the answers (every second turn) of the next one.

    Returns:
        Of dialogues as they were made how many it was `asked` about, and said `yes` to; likewise of the others.
    """
    records = {record["id"]: record for record in corpus.records()}
    counts = json.loads((corpus.folder / "statistics.json").read_text(encoding="utf-8"))["counts"]
    yes, no = (counts.get(f"converse/dialogues/{what}", 0) for what in ("accepted", "judged_bad"))
    settings = _settings(corpus)
    prompt, client = Prompt(**settings["prompt"]), Client(endpoint)

    async def judged(record: dict[str, Any], other: dict[str, Any]) -> bool | None:
        about = _passage(record, records, settings["passage"])
        answers = other["turns"][1::2]
        turns = [
            Turn(**(answers[place // 2 % len(answers)] if place % 2 else turn))
            for place, turn in enumerate(record["turns"])
        ]
        said = written(turns)
        messages = prompt.messages(passage=about, mark=mark_for(about, said), dialogue=said)
        try:
            return says_yes((await client.ask(messages, 0, YES_OR_NO)).text)
        except Trouble:  # longer than the context
            return None

    talks = [record for record in records.values() if record["darwin"]["level"] == 8]
    pairs = zip(talks, talks[1:] + talks[:1], strict=True) if len(talks) > 1 else []
    try:
        verdicts = await asyncio.gather(*(judged(*pair) for pair in pairs))
    finally:
        await client.close()
    told = [verdict for verdict in verdicts if verdict is not None]
    return {"asked": yes + no, "yes": yes, "exchanged_asked": len(told), "exchanged_yes": sum(told)}


def figures(path: Path, found: dict[str, Any]) -> None:
    """Write what came of it as benchmarks do."""
    sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))
    import common

    told = {
        f"level_{level}_{name}": float(found[f"level {level}"][name])
        for level in STEPS
        for name in ("documents", "raised", "holding")
    }
    told |= {f"judge_{name}": float(value) for name, value in found["level 8"]["judge"].items()}
    common.write(path, told, {level: each["counts"] for level, each in found.items()})


def show(found: dict[str, Any]) -> None:
    """Print it."""
    for level, each in found.items():
        print(
            f"\n{level} ({each['step']}): {each['documents']} documents, {each['raised']} at this level, of which "
            f"{each['holding']} hold when they are looked at again"
        )
        for name, count in each["counts"].items():
            print(f"  {count:>6}  {name}")
        if "judge" in each:
            judge = each["judge"]
            print(
                f"The judge said YES to {judge['yes']} of {judge['asked']} dialogues, and with answers of others "
                f"to {judge['exchanged_yes']} of {judge['exchanged_asked']}"
            )
        if each["example"] is not None:
            print(
                f"\n{each['example']['id']}\n"
                + "\n".join(f"  | {line}" for line in each["example"]["text"].split("\n"))
            )


if __name__ == "__main__":
    sys.exit(main())
