"""The house rules that a program can check: lint, types, floors, and what no file of the package may do."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_davinci"
BIN = Path(sys.executable).parent
LONGEST = 450

sources = sorted(PACKAGE.rglob("*.py"))
trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources}


def runs_clean(*command: str) -> None:
    tool = BIN / command[0]
    assert tool.exists(), f"{command[0]} is missing: make setup installs the extra [dev]"
    done = subprocess.run([tool, *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "command",
    ["ruff check .", "ruff format --check .", "mypy", "lint-imports"],
)
def test_lint(command):
    runs_clean(*command.split())


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def banned(tree: ast.AST) -> Iterator[str]:
    """What runs code or a shell that came from outside, each as `line: what`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
            for name in names:
                if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"):
                    yield f"{node.lineno}: imports {name}"
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
            yield f"{node.lineno}: calls {name}"
        if name in ("yaml.load", "yaml.load_all", "yaml.compose", "yaml.unsafe_load", "yaml.full_load"):
            loader = given.get("Loader") or (ast.unparse(node.args[1]) if len(node.args) > 1 else "")
            if not loader.endswith("SafeLoader"):
                yield f"{node.lineno}: {name} without SafeLoader"
        if name == "torch.load" and given.get("weights_only") != "True":
            yield f"{node.lineno}: torch.load without weights_only=True"
        if name.endswith("load") and given.get("allow_pickle") == "True":
            yield f"{node.lineno}: {name} with allow_pickle"
        if given.get("shell", "False") != "False":
            yield f"{node.lineno}: {name} with a shell"
        if given.get("trust_remote_code", "False") != "False":
            yield f"{node.lineno}: {name} trusts remote code"


def test_nothing_from_outside_is_run():
    assert {str(path): found for path, tree in trees.items() if (found := list(banned(tree)))} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec(text)",
        "os.system('ls')",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text, yaml.FullLoader)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_the_check_above_sees(code):
    assert len(list(banned(ast.parse(code)))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.safe_load(text)",
        "torch.load(path, weights_only=True)",
        "re.compile(text)",
        "model.eval()",
        "subprocess.run([program], shell=False)",
    ],
)
def test_and_lets_pass(code):
    assert list(banned(ast.parse(code))) == []


def cuda_names(tree: ast.AST) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda")
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.cuda"))
    ]


def test_only_the_platform_room_asks_about_cuda():
    asking = {path.relative_to(PACKAGE).parts[0] for path, tree in trees.items() if cuda_names(tree)}
    assert asking == {"platform"}
    assert cuda_names(ast.parse("x = torch.cuda.is_available()")) == [1]
    assert cuda_names(ast.parse("from torch.cuda import Stream")) == [1]


def test_a_file_is_about_one_thing():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    assert {str(path): lines for path, lines in lengths.items() if lines > LONGEST} == {}


def test_nothing_is_left_to_do():
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    files = [
        *sources,
        *(path for path in (ROOT / "examples").rglob("*") if path.suffix in (".py", ".yaml", ".sh")),
    ]
    left = [str(path) for path in files if marks.search(path.read_text(encoding="utf-8"))]
    assert left == []
    assert marks.search("# TODO: later")


def test_importing_a_room_imports_no_torch_unless_it_is_one_of_torchs():
    # `python -c "import megatron_davinci.config"` and the like must answer at once.
    light = ("megatron_davinci", "megatron_davinci.cli.main", "megatron_davinci.config", "megatron_davinci.data",
             "megatron_davinci.report", "megatron_davinci.errors", "megatron_davinci.files")  # fmt: skip
    code = f"import sys\nfor name in {light}: __import__(name)\nassert not {{'torch', 'megatron'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_a_submission_must_pass_is_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert commands[-1] == "make test"
    makefile = (ROOT / "Makefile").read_text()
    target = re.search(r"^test:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert target and "$(PYTEST)" in target[1]
    assert re.search(r"^PYTEST := .*-m pytest", makefile, re.MULTILINE)
