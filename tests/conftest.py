"""Markers, time per room, and the fixtures that more than one room uses."""

from __future__ import annotations

import importlib
import os
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.cases import LONG
from tests.record import Record

# A machine under load is not a failure: examples have no deadline, and no test is timed.
# `make test` draws the same examples every time, `make test-long` new ones.
_profile = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("house", derandomize=True, max_examples=30, **_profile)
settings.register_profile("long", derandomize=False, max_examples=100, print_blob=True, **_profile)

TESTS = Path(__file__).parent
# What the marker `needs` names, and the module that cannot be imported where it is not installed. DAVINCI_REQUIRE
# lists those (`dali,…`) that must be there: their tests fail instead of being skipped.
TOOLS = {
    "dali": "nvidia.dali",
    "wandb": "wandb",
    "submitit": "submitit",
    "ray": "ray",
    "lm_eval": "lm_eval",
    "chromium": "tests.need_chromium",
    **{name: f"tests.kernels.need_{name}" for name in ("nvrtc", "nvcc", "emulator")},
}
_seconds: dict[str, float] = defaultdict(float)
_record = Record()


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the tests marked long too")
    parser.addoption("--record", metavar="FILE", type=Path, help="write outcomes by room, as JSON")


def pytest_configure(config):
    # Ranks and Megatron-Core print nothing that a test needs; a test run is one thread a rank.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # What is printed here goes to a pipe, however wide the terminal of whoever runs the tests.
    os.environ.pop("COLUMNS", None)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ[LONG] = "1" if config.getoption("--long") else "0"
    settings.load_profile("long" if config.getoption("--long") else "house")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    # Many tests start ranks of their own, and many wait: one more than there are cores leaves none of them idle.
    return min(len(os.sched_getaffinity(0)) + 1, 4)


def pytest_collection_modifyitems(config, items):
    # The rooms that take longest first: no core is left waiting for a long file at the end.
    ceilings = _ceilings()
    items.sort(key=lambda item: -ceilings.get(_room(item.nodeid), 0))
    has_gpu: bool | None = None
    for item in items:
        if item.get_closest_marker("gpu"):
            if has_gpu is None:
                import torch

                has_gpu = torch.cuda.is_available()
            if not has_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="long: run by make test-long"))


def pytest_runtest_setup(item):
    required = os.environ.get("DAVINCI_REQUIRE", "").split(",")
    for tool in (name for marker in item.iter_markers("needs") for name in marker.args):
        try:
            importlib.import_module(TOOLS[tool])
        except ImportError as error:
            say = pytest.fail if tool in required else pytest.skip
            say(f"needs {tool}: {error}")


def _room(nodeid: str) -> str:
    parts = nodeid.split("::")[0].split("/")
    return parts[1] if len(parts) > 2 else "top"


def _ceilings() -> dict[str, int]:
    found: dict[str, int] = tomllib.loads((TESTS / "budget.toml").read_text())["seconds"]
    return found


def pytest_runtest_logreport(report):
    _seconds[_room(report.nodeid)] += report.duration
    _record.add(_room(report.nodeid), report.nodeid, report.outcome)


def pytest_terminal_summary(terminalreporter, config):
    if not _seconds:
        return
    if path := config.getoption("--record"):
        _record.write(path, _seconds, config.getoption("--long"))
    ceilings = _ceilings()
    terminalreporter.section("time per room")
    for room, seconds in sorted(_seconds.items(), key=lambda pair: -pair[1]):
        ceiling = ceilings.get(room)
        note = "no ceiling in tests/budget.toml" if ceiling is None else f"ceiling {ceiling} s"
        if ceiling is not None and seconds > ceiling:
            note += "  OVER: move tests to `make test-long`"
        terminalreporter.write_line(f"{room:<14}{seconds:8.1f} s   {note}")


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """A fresh working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
