"""Level 5's completion: explanations are welcome, and nothing of the source may be lost or other."""

from __future__ import annotations

import json

import pytest

from megatron_davinci.cli.main import main
from megatron_davinci.darwin.complete import completion_violations
from megatron_davinci.darwin.lineage import events, find
from tests.darwin.making import made, prose, recipe
from tests.darwin.model_server import passage, serving

SOURCE = """## Energy

The rest energy of a body is $E = mc^2$. A mass of 2.5 kg does not lose energy at 300 K. (7)

```python
energy = mass * c ** 2
```

Hence light bodies store more energy than fuel."""
ANSWER = """## Energy

The rest energy of a body is $E = mc^2$, where m is its mass and c is the speed of light. To see why, take the two
steps one after the other: $E / m = c^2$ follows by dividing. A mass of 2.5 kg does not lose energy at 300 K. (7)

In code, with 2.5 for the mass:

```python
energy = mass * c ** 2
```

Because the square of c is so large, a little mass is much energy. Hence light bodies store more energy than fuel."""


def test_explanations_pass():
    assert completion_violations(SOURCE, ANSWER) == []


@pytest.mark.parametrize(
    "old,new,name",
    [
        ("300 K", "301 K", "dropped_number"), ("2.5 kg", "2.5 g", "changed_unit"),
        ("take the", "take 4711", "added_number"), ("$E = mc^2$,", "E,", "dropped_formula"),
        ("## Energy", "", "dropped_heading"), (" (7)", " (seven)", "dropped_equation_number"),
        ("* c ** 2", "* c", "dropped_code"), ("does not lose", "does lose", "changed_negation"),
        ("than fuel.", "than fuel. Next come galaxies. They have bright arms. Stars form there.", "stops_elsewhere"),
        (ANSWER, "Energy.", "too_short"), ("In code", "Here is the rewritten version. In code", "speaks_of_the_task"),
        ("In code", "The passage explains code. In code", "speaks_of_the_task"),
        ("In code", "and on it goes for ever and ever again " * 12 + "In code", "repetition"),
    ],
)  # fmt: skip
def test_each_violation_is_named(old, new, name):
    assert old in ANSWER and name in completion_violations(SOURCE, ANSWER.replace(old, new))


def test_documents_are_completed_in_chunks_of_tokens(tmp_path):
    (tmp_path / "raw").mkdir()
    text = "\n\n".join(part for part in prose()[35].split("\n\n") if len(part) > 80)
    (tmp_path / "raw" / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    tokenizer = tmp_path / "tokenizer"
    assert (
        main(
            [
                "data",
                "train-tokenizer",
                str(tmp_path / "raw" / "a.jsonl"),
                "--vocab-size",
                "300",
                "--out",
                str(tokenizer),
            ]
        )
        == 0
    )

    def teacher(content):
        text, mark = passage(content)
        return f"<{mark}>Put into simple words, with all reasons given:\n\n{text}</{mark}>"

    with serving() as server:
        server.model = teacher
        given = {"endpoint": server.endpoint(timeout=5.0), "chunk": 150, "tokenizer": str(tokenizer),
                 "answers": str(tmp_path / "answers.sqlite")}  # fmt: skip
        sources = [{"name": "papers", "paths": ["raw/*.jsonl"]}]
        corpus = made(recipe(tmp_path, sources=sources, steps=[{"complete": given}]))
        [record] = corpus.records()
        chunks = record["darwin"]["operations"][-1]["notes"]["chunks"]
        assert record["darwin"]["level"] == 5 and set(chunks) == {"completed"} and chunks["completed"] > 2
        assert record["text"].count("Put into simple words") == chunks["completed"] == len(server.requests)
    told = list(events(find([corpus], record["id"])))
    assert told[-1].after == record["text"] and not told[-1].trouble
