"""Importing is quiet, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def python(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments, *(["-c", code] if code else [])]
    # As a user's shell: what the test run sets for its own quiet is not there.
    quiet = ("PYTHONWARNINGS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in quiet}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_megatron_core_and_our_rooms_import_without_a_word():
    done = python(
        "-W",
        "error",
        code="import megatron_davinci, megatron.core, megatron_davinci.train.loop, megatron_davinci.cli.train",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


HEAVY = """
import json, sys
sys.argv = ["davinci", *sys.argv[1:]]
from megatron_davinci.cli.main import main
try:
    code = main()
except SystemExit as leaving:
    code = leaving.code
heavy = {"torch", "megatron", "transformers", "numpy", "tokenizers", "pydantic", "yaml", "matplotlib", "rich"}
print(json.dumps([code, sorted(heavy & set(sys.modules))]))
"""


def heavy(*arguments: str) -> list:
    done = python("-c", HEAVY, *arguments)
    return json.loads(done.stdout.splitlines()[-1])


def test_help_imports_nothing_heavy():
    assert heavy("--help") == [0, []]
    assert heavy("--version") == [0, []]
    assert heavy("data", "tokenize", "--help") == [0, []]


def test_the_package_imports_neither_torch_nor_megatron_core():
    code, imported = heavy("plan", "--help")
    assert code == 0
    assert not {"torch", "megatron", "transformers"} & set(imported)


def test_the_hook_goes_in_once():
    from megatron_davinci.platform.import_hook import FINDER, install

    install()
    install()
    assert sys.meta_path.count(FINDER) == 1
    assert FINDER.find_spec("json") is None and FINDER.find_spec("megatron.corentine") is None
