"""A refining job on a real model behind a bad way, killed again and again, against one that nothing happened to."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datatrove.data import Document

from megatron_davinci.darwin.answers import Answers
from megatron_davinci.darwin.chunks import cut
from megatron_davinci.darwin.corpus import Corpus
from megatron_davinci.darwin.recipe import LoadedRecipe
from tests.darwin import tiny_model
from tests.darwin.fault_proxy import FAULTS, OF_STREAMS, Proxy, between
from tests.darwin.making import digests, made, recipe

LOOPS = 0.06  # of questions have an answer without end
Start = Callable[[LoadedRecipe, int], Any]


def same(corpus: Corpus) -> tuple[dict[str, str], dict[str, Any]]:
    """All of a corpus but how often the model was asked, and where it and its answers were."""
    operations = [
        {key: value for key, value in each.items() if key != "whereabouts"}
        for each in corpus.manifest["operations"]
    ]
    files = digests(corpus.folder)
    left = {name: digest for name, digest in files.items() if name not in ("corpus.json", "requests.json")}
    return left, corpus.manifest | {"operations": operations}


def as_process(loaded: LoadedRecipe, workers: int) -> subprocess.Popen[bytes]:
    """`davinci data run`, as a user starts it."""
    command = [sys.executable, "-m", "megatron_davinci.cli.main", "data", "run", str(loaded.path)]
    return subprocess.Popen(
        [*command, "--workers", str(workers)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def refining(folder: Path, out: str, url: str, documents: int, stream: bool = False) -> LoadedRecipe:
    """The job, in a folder with its raw files and prompts; with `stream` its answers come in pieces."""
    raw = folder / "raw"
    if not raw.is_dir():
        raw.mkdir(parents=True)
        tiny_model.prompt_files(folder)
        for number, text in enumerate(tiny_model.pages(documents)):
            (raw / f"{number:02d}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    endpoint = {"url": url, "model": "tiny", "max_tokens": tiny_model.ANSWER, "concurrency": 4, "requests": 40,
                "timeout": 5.0, "response_bytes": 100_000, "stream": stream}  # fmt: skip
    step = {"endpoint": endpoint, "prompt": "tiny_edit.yaml", "chunk": tiny_model.CHUNK, "pass_share": 0.3,
            "answers": f"{out}.sqlite"}  # fmt: skip
    sources = [{"name": "help", "paths": ["raw/*.jsonl"], "licence": "PSF-2.0"}]
    limits = {"task_bytes": 12_000}
    return recipe(folder, out, sources=sources, steps=[{"refine": step}], limits=limits)


def trial(
    folder: Path,
    upstream: str,
    seed: int,
    kills: int,
    documents: int,
    start: Start,
    quick: bool = False,
    stream: bool = False,
) -> dict[str, Any]:
    """Run the job twice, once in peace and once not.

    Args:
        folder: To work in.
        upstream: The model's server.
        seed: Of faults and of when it is killed.
        kills: How often it is killed.
        documents: Of the job.
        start: Starts it in a process that has `kill`, `pid` and is told by `wait_for` to be at its end.
        stream: Whether the answers of the job that is killed come in pieces; those of the other one come whole.
        quick: Without answers that come too late, which cost seconds each, and with one worker only.

    Returns:
        `figures`, and `counts` of what happened.
    """
    with between(upstream, seed, loops=LOOPS) as proxy:
        whole = made(refining(folder, "whole", proxy.url, documents))
    with between(upstream, seed, share=0.25, loops=LOOPS) as proxy:
        proxy.slow = 6.0
        kinds = (*FAULTS, *OF_STREAMS) if stream else FAULTS
        proxy.kinds = tuple(kind for kind in kinds if kind != "slow" or not quick)
        loaded = refining(folder, "killed", proxy.url, documents, stream)
        done = killed(loaded, proxy, random.Random(seed), kills, start, 1 if quick else 2)
        corpus = made(loaded)
        faults, delivered = dict(proxy.faults), dict(proxy.delivered)
    expected, found = rows(folder / "whole.sqlite"), rows(folder / "killed.sqlite")
    used, told = uses(corpus, loaded)
    again = sum(delivered.values()) - len(delivered)
    untouched, exact, refined = reassembled(corpus, loaded)
    return {
        "figures": {
            "identical_output": float(same(corpus) == same(whole)),
            "same_answers": float(expected == found),
            "calls_used_exactly_once_fraction": sum(used[key] == 1 for key in found) / len(found),
            "documents_told_again_from_answers_fraction": told,
            "calls_used_that_are_not_on_disk": float(len(set(used) - set(found))),
            "untouched_chunks_byte_exact_fraction": exact / untouched,
            "asked_again_within_bound": float(again <= 4 * (done + 1)),
        },
        "counts": {
            "kills": done, "questions": len(found), "requests": sum(faults.values()), "faults": faults,
            "answered_more_than_once": again, "untouched_chunks": untouched, "refined_chunks": refined,
            "documents": documents,
        },
    }  # fmt: skip


def killed(
    loaded: LoadedRecipe, proxy: Proxy, draw: random.Random, kills: int, start: Start, workers: int
) -> int:
    """Start the job and kill it after a few requests, by turns with one worker and with more; returns how often."""
    done = 0
    for number in range(kills):
        until = proxy.requests + draw.randrange(2, 9)
        process = start(loaded, 1 + number % workers)
        while (alive := _alive(process)) and proxy.requests < until:
            time.sleep(0.005)
        if not alive:
            break
        done += 1
        os.kill(process.pid, signal.SIGKILL)
        process.join() if hasattr(process, "join") else process.wait()
    return done


def _alive(process: Any) -> bool:
    return process.is_alive() if hasattr(process, "is_alive") else process.poll() is None


def rows(path: Path) -> dict[bytes, str]:
    """All answers of a file."""
    answers = Answers(path, read_only=True)
    try:
        return dict(answers._base.execute("SELECT question, text FROM answers"))
    finally:
        answers.close()


@contextmanager
def counted() -> Iterator[Counter[bytes]]:
    """How often each answer is taken from a file, while the block runs."""
    taken, get = Counter[bytes](), Answers.get

    def counting(answers: Answers, key: bytes) -> Any:
        found = get(answers, key)
        if found is not None:
            taken[key] += 1
        return found

    Answers.get = counting
    try:
        yield taken
    finally:
        Answers.get = get


def uses(corpus: Corpus, loaded: LoadedRecipe) -> tuple[Counter[bytes], float]:
    """How often each answer was used by the documents, and the share of documents that it tells again to the byte.

    Each document is made again of its raw text and the answers on disk, without the model.
    """
    [step] = loaded.recipe.make_steps(loaded.base)
    raw = [json.loads(path.read_text())["text"] for path in sorted((loaded.base / "raw").iterdir())]
    alike = 0
    with counted() as taken:
        for record, text in zip(corpus.records(), raw, strict=True):
            metadata = {key: value for key, value in record.items() if key not in ("id", "text")}
            outcome = step.replay(Document(text=text, id=record["id"], metadata=metadata))
            notes = record["darwin"]["operations"][-1]["notes"]
            tokens = [
                outcome.notes.get(name) == notes.get(name) for name in ("prompt_tokens", "completion_tokens")
            ]
            alike += all(tokens) and (outcome.text or text) == record["text"]
    return taken, alike / len(raw)


def reassembled(corpus: Corpus, loaded: LoadedRecipe) -> tuple[int, int, int]:
    """Chunks that stayed as they were, how many of them stand in the output to the byte, and how many were changed.

    The output is walked through by hand, chunk by chunk, with what the answers on disk say of each.
    """
    [step] = loaded.recipe.make_steps(loaded.base)
    raw = [json.loads(path.read_text())["text"] for path in sorted((loaded.base / "raw").iterdir())]
    untouched = exact = refined = 0
    step._begin(asks=False)
    try:
        for record, text in zip(corpus.records(), raw, strict=True):
            at, kept = 0, record["darwin"]["level"] == 0
            document = Document(text=text, id=record["id"])
            for chunk in cut(text, tiny_model.CHUNK):
                piece = step._submit(step._rewrite(document, chunk, Counter(), Counter())).result()
                new = None if kept else piece.text
                body = chunk.text if new is None else new
                whole = chunk.before + body + chunk.after
                if new == "":
                    whole = chunk.after if at and not record["text"][:at].endswith("\n") else ""
                stands = record["text"].startswith(whole, at)
                at += len(whole)
                untouched, exact, refined = (
                    untouched + (new is None), exact + (new is None and stands), refined + (new is not None)
                )  # fmt: skip
            assert at == len(record["text"])
    finally:
        step.close()
    return untouched, exact, refined
