"""What the documentation shows is true: it builds, its links lead somewhere, its commands and files are valid."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

from megatron_davinci.cli import main as cli
from megatron_davinci.cli.train import add_arguments as add_train_arguments
from megatron_davinci.config import RunConfig, load_config, validate
from megatron_davinci.darwin.recipe import Recipe
from megatron_davinci.errors import ConfigError
from megatron_davinci.lab.design import Design
from megatron_davinci.lab.mixtures import Search
from megatron_davinci.train.plan import plan_run

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart" / "config.yaml"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for _, language, body in FENCE.findall(page.read_text("utf-8")) if language in languages]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text("utf-8"))


# ---- the site --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config as load_site

    folder = tmp_path_factory.mktemp("site")
    config = load_site(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


def test_the_site_builds_strictly_with_every_page_in_it(site):
    for page in (ROOT / "docs").rglob("*.md"):
        place = page.relative_to(ROOT / "docs").with_suffix("")
        assert (site / place / "index.html").exists() or (site / f"{place}.html").exists()


def test_a_built_page_loads_nothing_from_another_host(site):
    loads = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")
    for page in site.rglob("*.html"):
        # A canonical link names a page and loads nothing; there is none, since the site has no address.
        assert loads.findall(page.read_text("utf-8")) == [], page


# ---- links -----------------------------------------------------------------------------------------------


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        place, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / place).resolve() if place else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    assert broken_links(page) == []


def test_a_link_that_leads_nowhere_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](#one) [b](#two) [c](other.md)\n")
    assert broken_links(page) == ["#two", "other.md"]


# ---- generated pages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["configuration.md", "cli.md"])
def test_generated_pages_are_those_of_the_code(name):
    current = tool("make_reference").pages()[name]
    assert (ROOT / "docs" / "reference" / name).read_text("utf-8") == current, "run tools/make_reference.py"


def test_every_key_of_the_schema_is_in_the_reference():
    text = (ROOT / "docs" / "reference" / "configuration.md").read_text("utf-8")
    for path, section in tool("make_reference").sections(RunConfig):
        assert f"## `{path}`" in text or not path
        for key in section.model_fields:
            assert f"| `{key}` |" in text


def test_messages_in_the_pages_are_those_that_the_commands_give():
    messages = tool("refresh_messages")
    pages = messages.pages_with_messages()
    assert len(pages) >= 3
    for page in pages:
        text = page.read_text("utf-8")
        assert text == messages.refreshed(text), f"{name_of(page)}: run tools/refresh_messages.py"


# ---- commands --------------------------------------------------------------------------------------------


OURS = re.compile(r"^(?:\$ )?((?:\S*/)?davinci .*|.*-m megatron_davinci\.train .*)$")


def command_lines(page: Path) -> list[str]:
    """The commands of ours in a page's blocks: continued lines joined, prompts and comments dropped."""
    lines = []
    for body in blocks(page, "bash", "console"):
        for line in body.replace("\\\n", " ").splitlines():
            if ours := OURS.match(line.strip()):
                lines.append(shlex.join(shlex.split(ours[1], comments=True)))
    return lines


class Parsed(Exception):
    """Carries what the real parser made of a command line."""


def parse(line: str, monkeypatch) -> argparse.Namespace:
    """What a command line means to the real parser; nothing runs."""
    words = shlex.split(line)
    if "megatron_davinci.train" in words:
        parser = argparse.ArgumentParser()
        add_train_arguments(parser)
        return parser.parse_args(words[words.index("megatron_davinci.train") + 1 :])
    arguments = words[words.index("davinci") + 1 :] if "davinci" in words else words[1:]

    def stop(parsed):
        raise Parsed(parsed)

    for module, _ in cli.COMMANDS.values():
        monkeypatch.setattr(importlib.import_module(module), "run", stop)
    with pytest.raises(Parsed) as caught:
        cli.main(arguments)
    return caught.value.args[0]


SHOWN = sorted({(name_of(page), line) for page in PAGES for line in command_lines(page)})


def test_the_documentation_shows_commands():
    assert len(SHOWN) > 20


@pytest.mark.parametrize(("page", "line"), SHOWN)
def test_every_command_parses_and_its_configuration_is_valid(page, line, monkeypatch):
    arguments = parse(line, monkeypatch)
    config = getattr(arguments, "config", None)
    refused = f"$ {line}\nerror:" in (ROOT / page).read_text("utf-8")
    if config and (ROOT / config).exists() and not refused:
        load_config(ROOT / config, arguments.overrides)


def test_a_command_that_does_not_parse_is_seen(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse("davinci plan --rank-count many", monkeypatch)


def test_every_command_that_is_named_in_prose_exists():
    for page in PAGES:
        for command in re.findall(r"`davinci ([a-z][a-z-]*)", prose(page)):
            assert command in cli.COMMANDS, f"{name_of(page)}: davinci {command}"


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text("utf-8"), re.MULTILINE):
            assert target in targets, f"{name_of(page)}: make {target}"


# ---- configurations --------------------------------------------------------------------------------------


def laid_over(below: dict, above: dict) -> dict:
    """`below` with the keys of `above`, section by section."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = laid_over(below[key], value) if both else value
    return merged


def shown_settings() -> list[tuple[str, dict]]:
    found = []
    for page in PAGES:
        for body in blocks(page, "yaml"):
            settings = yaml.safe_load(body)
            found.append((f"{name_of(page)}: {', '.join(settings)}", settings))
    return found


@pytest.mark.parametrize(
    ("name", "settings"), shown_settings(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_configuration_that_is_shown_is_valid(name, settings):
    if "rounds" in settings:  # a search of the lab
        Search.model_validate(settings)
        return
    if "question" in settings:  # a design of the lab
        Design.model_validate(settings)
        return
    if {"sources", "steps"} & settings.keys():  # a recipe of a corpus, or its steps
        rest = {"name": "corpus", "out": "corpus", "sources": [{"name": "text", "paths": ["*.txt"]}]}
        Recipe.model_validate(rest | settings)
        return
    if "run" not in settings:  # some sections, or parts of them: laid over the quickstart's
        settings = laid_over(yaml.safe_load(QUICKSTART.read_text()), settings)
    validate(settings, where=name)


def test_a_configuration_that_is_not_valid_is_seen():
    with pytest.raises(ConfigError, match="unknown key"):
        validate(yaml.safe_load(QUICKSTART.read_text()) | {"paralel": {}}, where="here")


# ---- figures ---------------------------------------------------------------------------------------------


def test_the_quickstarts_figures_are_those_of_its_configuration():
    config = load_config(QUICKSTART)
    plan = plan_run(config, 2)
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert f"{config.model.parameters() / 1e6:.1f}M parameters" in readme
    assert (
        f"{sum(stage.tokens for stage in config.curriculum) / 1e6:g}M tokens in {plan.total_steps:,} steps"
        in readme
    )
    table = (ROOT / "docs" / "concepts" / "curriculum.md").read_text("utf-8")
    samples = 0
    for stage in plan.stages:
        samples += stage.samples
        assert re.search(rf"^\| {stage.name} \|.*\| {samples:,} \|$", table, re.MULTILINE), stage


def test_the_steps_of_the_reports_recipe_are_computed():
    plan = plan_run(load_config(ROOT / "examples" / "davinci_3b" / "config.yaml"), 1)
    text = (ROOT / "examples" / "davinci_3b" / "README.md").read_text("utf-8")
    for stage in plan.stages:
        assert re.search(rf"^\| {stage.name} \|.*\| {stage.steps:,} \|", text, re.MULTILINE), stage
    assert f"{plan.parameters / 1e9:.3f}B parameters" in text


def test_the_tools_write_what_the_tests_compare(tmp_path, monkeypatch):
    reference = tool("make_reference")
    monkeypatch.setattr(reference, "REFERENCE", tmp_path)
    reference.main()
    assert {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()} == reference.pages()
