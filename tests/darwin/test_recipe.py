from pathlib import Path

import pytest
import yaml

from megatron_davinci.cli.main import main
from megatron_davinci.darwin.catalogue import STEPS
from megatron_davinci.darwin.inventory import take_inventory
from megatron_davinci.darwin.recipe import load_recipe
from megatron_davinci.darwin.step import GlobalStep, Step
from megatron_davinci.errors import ConfigError
from tests.darwin.making import recipe

GOOD = {"name": "c", "out": "corpus", "sources": [{"name": "a", "paths": ["*.txt"]}], "steps": []}


def problems(tmp_path, **changes) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes, sort_keys=False))
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    return str(caught.value)


def test_an_unknown_step_is_named_with_the_nearest(tmp_path):
    said = problems(tmp_path, steps=["normalize_text"])
    assert "steps.0 (line 8)" in said and "did you mean normalise_text?" in said


def test_every_problem_is_named_at_once(tmp_path):
    said = problems(
        tmp_path,
        steps=[
            {"length": {"min_charcters": 3}},
            "gopher",
            {"garble": {"max_share": 2}},
            {"exact_dedup": {"sources": ["b"]}},
        ],
    )
    assert "4 problems" in said
    assert "steps.0.length.min_charcters" in said and "did you mean min_characters?" in said
    assert "there is no step 'gopher'" in said
    assert "steps.2.garble.max_share" in said and "less than or equal to 1" in said
    assert "there is no source 'b'; there are a" in said


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"sources": [GOOD["sources"][0]] * 2}, "is another source's name too"),
        ({"sources": [{"name": "../a", "paths": ["x"]}]}, "sources.0.name"),
        ({"steps": [{"length": {}, "garble": {}}]}, "should be a step's name"),
        ({"otput": {}}, "did you mean output?"),
        ({"steps": [{"extract_pdf": {"sources": 5}}, "ocr_pdf"]}, "steps.0.extract_pdf.sources"),
        ({"steps": [{"extract_pdf": {"sources": [{"a": 1}]}}]}, "steps.0.extract_pdf.sources.0"),
        ({"limits": {"document_bytes": 0}}, "greater than 0"),
    ],
)
def test_what_a_recipe_may_not_say(tmp_path, changes, said):
    assert said in problems(tmp_path, **changes)


def test_brackets_in_the_name_of_a_folder_are_no_pattern(tmp_path):
    folder = tmp_path / "corpora [old]"
    for path in ("raw/one.txt", "code [a]/two.py"):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text("Some text.")
    (folder / "list.jsonl").write_text('{"path": "code [a]", "name": "r"}')
    sources = [
        {"name": "texts", "paths": ["raw/*.txt"]},
        {"name": "code", "paths": ["*.py"], "repositories": "list.jsonl"},
    ]
    files = take_inventory(recipe(folder, sources=sources, steps=[]))
    assert [file.name for file in files] == ["raw/one.txt", "r/two.py"]


def test_a_source_without_files_is_named(tmp_path):
    from megatron_davinci.darwin.run import run_recipe

    loaded = recipe(tmp_path, sources=[{"name": "a", "paths": ["nothing/*.txt"]}], steps=[])
    with pytest.raises(ConfigError, match=r"sources\.0\.paths\.0"):
        run_recipe(loaded)
    assert not (tmp_path / "corpus").exists()


def test_the_catalogue_describes_every_parameter(capsys):
    for name, step in STEPS.items():
        assert issubclass(step, Step) and step.name == name and step.about and 0 <= step.level <= 9
        assert not (step.edits and step.level == 3)
        assert issubclass(step, GlobalStep) or step.apply is not Step.apply
        assert main(["data", "steps", name]) == 0
        shown = capsys.readouterr().out
        assert all(parameter in shown for parameter in step.Parameters.model_fields)
        rows = [
            line
            for line in shown.splitlines()
            if line.split()[:1] and line.split()[0] in step.Parameters.model_fields
        ]
        assert all(len(row.split()) > 2 for row in rows), shown
    assert main(["data", "steps"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in STEPS)


def test_a_step_that_is_not_there_is_named_with_the_nearest(capsys):
    assert main(["data", "steps", "gopher_qualty"]) == 2
    assert "gopher_quality" in capsys.readouterr().err


def test_the_quickstarts_recipe_is_one():
    loaded = load_recipe(Path(__file__).parents[2] / "examples" / "quickstart" / "corpus.yaml")
    names = [source.name for source in loaded.recipe.sources]
    domains = ("general", "code", "science", "qa")
    assert sorted(names) == sorted(f"{domain}.{side}" for domain in domains for side in ("train", "valid"))
    assert all(name.endswith(".valid") for name in names[:4]), "of duplicates the held-out one is kept"
    steps = loaded.recipe.make_steps(loaded.base)
    assert {step.level for step in steps} == {1, 2, 3}
    # What judges a document looks at training text only.
    judges = [step for step in steps if step.name not in ("normalise_text", "minhash_dedup", "classify")]
    assert all(name.endswith(".train") for step in judges for name in step.parameters.sources)
