"""Pages in a real browser at a laptop's width, with no network: nothing is missing, and nothing complains."""

from __future__ import annotations

import pytest

from megatron_davinci.lab.report import write_index, write_report
from megatron_davinci.report.run import write_run_report
from tests.browser import WIDTH, look
from tests.lab.test_verdict import judged
from tests.report.fake_run import write_fake_run

pytestmark = pytest.mark.needs("chromium")


def check(page, scratch, *, drawings):
    seen = look(page, scratch)
    assert seen.console == []
    assert all(seen.images)
    assert len(seen.drawings) >= drawings
    assert all(seen.drawings)
    assert seen.width <= WIDTH
    assert seen.size >= 9


def test_a_runs_page(tmp_path):
    check(write_run_report(write_fake_run(tmp_path / "run", steps=400)), tmp_path, drawings=4)


def test_the_labs_page_and_its_index(tmp_path):
    folder = tmp_path / "lab" / "designs" / "d"
    design, arms, runs, outcomes, verdict = judged(tmp_path, {"b": 0.1})
    check(write_report(folder, design, arms, runs, outcomes, verdict), tmp_path, drawings=2)
    check(write_index(tmp_path / "lab"), tmp_path, drawings=0)


def test_what_is_wrong_is_seen(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<!doctype html><body><img src="none.png"><div style="width: 3000px">wide</div><svg width="0"></svg>'
        '<script src="https://example.org/x.js"></script><script>console.error("no")</script>'
    )
    seen = look(page, tmp_path)
    assert seen.images == [False]
    assert seen.drawings == [False]
    assert seen.width > WIDTH
    assert any("no" in line for line in seen.console)
