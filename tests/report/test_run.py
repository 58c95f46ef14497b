"""The page of a run: finished, at work, crashed, empty, enormous."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_davinci.errors import DataError
from megatron_davinci.report.plots import Plot
from megatron_davinci.report.run import run_page, write_run_report
from megatron_davinci.report.run_files import read_run
from megatron_davinci.report.run_plots import batch_size_plot, heldout_plot, loss_plot, mixture_plot
from megatron_davinci.report.run_story import RunStory
from tests.report.fake_run import BIGRAM, SEQUENCE_LENGTH, write_fake_run
from tests.report.test_page import Outline, fetches


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_fake_run(tmp_path_factory.mktemp("runs") / "full", steps=3000)
    write_run_report(folder)
    return folder


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are left out of pages: what is looked at is the text, and a page of plots takes seconds to draw."""
    monkeypatch.setattr(Plot, "svg", lambda self, id_prefix="": "<svg></svg>")


def page_of(folder: Path) -> str:
    """The page alone: the pictures beside it are looked at where they matter."""
    return run_page(story_of(folder))[0].html()


def story_of(folder: Path) -> RunStory:
    return RunStory(read_run(folder))


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_the_page_is_complete_and_self_contained(run: Path) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    assert headings == [
        "Held-out loss",
        "Training loss",
        "Mixture",
        "Stages",
        "Schedule",
        "Speed and stability",
        "Where the time goes",
        "Samples",
        "Record",
    ]
    assert fetches(html) == []
    outline = Outline(html)
    assert outline.open == []
    assert len(outline.ids) == len(set(outline.ids))
    assert 'class="notice"' not in html


def test_the_strip_has_the_key_figures(run: Path) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    loss = json.loads((run / "summary.json").read_text())["heldout_loss"]["code"]
    strip = re.sub(r"<[^>]+>", " ", html[html.index('<dl class="strip"') : html.index("<section")])
    assert "6.29M" in strip
    assert f"{loss:.3f}" in strip
    assert f"{BIGRAM['code'] - loss:.2f} nats below the bigram model (4.38)" in strip
    assert "41% of the matmul peak" in strip


def test_every_plot_is_a_png_too(run: Path) -> None:
    pictures = sorted(path.name for path in (run / "plots").iterdir())
    assert pictures == [
        "a-step-by-phase.png",
        "batch-size.png",
        "gradient-norm.png",
        "held-out-loss-at-the-end.png",
        "held-out-loss.png",
        "learning-rate.png",
        "mixture.png",
        "throughput.png",
        "time-by-phase.png",
        "tokens-by-domain.png",
        "training-loss-by-domain.png",
        "training-loss.png",
    ]
    for path in [run / "report.png", *(run / "plots").iterdir()]:
        image = Image.open(io.BytesIO(path.read_bytes()))
        image.load()
        assert min(image.size) > 200


@pytest.mark.long
def test_the_same_files_give_the_same_bytes(run: Path) -> None:
    before = {path: path.read_bytes() for path in (run / "report.html", run / "report.png")}
    write_run_report(run)
    assert {path: path.read_bytes() for path in before} == before


def test_stages_follow_the_clock(run: Path) -> None:
    story = story_of(run)
    assert [stage.name for stage in story.stages] == ["1-1", "1-2", "2-1", "2-2"]
    assert story.stages[0].start == 0
    assert all(a.end == b.start for a, b in zip(story.stages, story.stages[1:]))
    assert story.stages[-1].end == story.consumed_tokens
    assert story.stages[3].mixture == pytest.approx(
        {"general": 0.1884, "code": 0.0261, "science": 0.0855, "QA": 0.7}
    )


def test_the_mixture_is_by_domain_over_tokens(run: Path) -> None:
    plot = mixture_plot(story_of(run))
    assert plot is not None
    shares = np.array([values for _, _, values in plot.bands])
    assert [name for name, _, _ in plot.bands] == ["general", "code", "science", "QA"]
    assert shares.sum(axis=0) == pytest.approx(1.0)
    assert shares[2] == pytest.approx([0.2227, 0.3292, 0.3, 0.0855])
    journal = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    assert list(np.asarray(plot.edges)[:-1]) == [line["first_sample"] * SEQUENCE_LENGTH for line in journal]


def test_a_domain_has_one_colour_in_every_plot(run: Path) -> None:
    story = story_of(run)
    heldout, mixture = heldout_plot(story), mixture_plot(story)
    assert heldout is not None and mixture is not None
    assert {one.name: one.colour for one in heldout.series} == {name: slot for name, slot, _ in mixture.bands}
    assert {one.name: one.level for one in heldout.series} == BIGRAM


def test_a_schedule_changes_where_its_stage_begins(run: Path) -> None:
    story = story_of(run)
    plot = batch_size_plot(story)
    assert plot is not None
    x, y = np.asarray(plot.series[0].x), np.asarray(plot.series[0].y)
    assert (x[0], x[-1]) == (0, story.consumed_tokens)
    assert x[np.flatnonzero(np.diff(y))[-1] + 1] == story.stages[1].start


def test_the_mean_of_the_loss_does_not_reach_over_a_stage_boundary(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", steps=400, evaluations=0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["loss"] = 4.0 if line["stage"] == "1-1" else 2.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot = loss_plot(story_of(folder))
    assert plot is not None
    assert set(np.asarray(plot.series[0].y)) == {2.0, 4.0}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("tail", ['{"step": 31, "loss": 2.', "{", '{"step": 3\ud83d'[:-1]])
def test_a_line_that_is_being_written_is_not_read(tmp_path: Path, tail: str) -> None:
    folder = write_fake_run(tmp_path / "run", steps=30, evaluations=3, finished=False)
    for name in ("metrics.jsonl", "evals.jsonl", "journal.jsonl"):
        append(folder / name, tail)
    files = read_run(folder)
    assert len(files.metrics) == 30
    assert files.problems == []
    assert "the run is still going" in page_of(folder)


def test_a_whole_line_that_is_damaged_is_named(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", steps=5, evaluations=0)
    append(
        folder / "metrics.jsonl", "{half\n[1]\n" + json.dumps({"step": 6, "stage": "2-2", "loss": 3.0}) + "\n"
    )
    files = read_run(folder)
    assert list(files.metrics.step) == [1, 2, 3, 4, 5, 6]
    assert files.problems == [
        "metrics.jsonl: 2 lines could not be read and are left out, the first is line 6."
    ]


def test_steps_that_a_restart_did_again_count_once(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", steps=5, evaluations=0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[2:4]:  # from the checkpoint of step 2, and still at work
        append(folder / "metrics.jsonl", json.dumps({**line, "loss": 7.0}) + "\n")
    metrics = read_run(folder).metrics
    assert list(metrics.step) == [1, 2, 3, 4]
    assert list(metrics["loss"][2:]) == [7.0, 7.0]


def test_an_empty_folder_is_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    html = page_of(tmp_path)
    assert "No step has been recorded yet." in html
    for name in ("manifest.json", "config.yaml", "metrics.jsonl", "evals.jsonl", "journal.jsonl"):
        assert f"{name} is not there." in html
    assert "<figure" not in html


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_has_just_begun(tmp_path: Path, steps: int) -> None:
    folder = write_fake_run(tmp_path / "run", steps=steps, evaluations=min(steps, 1), finished=False)
    html = write_run_report(folder).read_text(encoding="utf-8")
    assert (folder / "report.png").exists() == (steps > 0)
    assert ("Training loss" in html) == (steps > 0)
    assert ("No step has been recorded yet." in html) == (steps == 0)
    assert Outline(html).open == []


def test_a_run_of_many_steps_is_a_page_of_ordinary_size_that_keeps_its_spike(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", steps=0)
    spike = 23_457
    (folder / "metrics.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "step": i,
                    "stage": "1-1",
                    "consumed_tokens": i * 8192,
                    "loss": 99.5 if i == spike else 3.0 + 1 / i,
                }
            )
            + "\n"
            for i in range(1, 30_001)
        )
    )
    plot = loss_plot(story_of(folder))
    assert plot is not None
    svg = plot.svg()
    assert len(svg) < 150_000
    assert ">100<" in svg or ">80<" in svg  # the axis goes up to the spike


@pytest.mark.usefixtures("undrawn")
def test_steps_without_a_finite_loss_are_said_first(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", steps=3, evaluations=0)
    append(folder / "metrics.jsonl", '{"step": 4, "stage": "2-2", "loss": NaN, "grad_norm": Infinity}\n')
    html = page_of(folder)
    assert "1 step has no finite loss, the first is step 4." in html
    assert "1 step has no finite gradient norm" in html


def test_a_run_named_to_do_harm_does_none(tmp_path: Path) -> None:
    name = '<script src="http://evil.example/"></script>$\\frac{'
    folder = write_fake_run(tmp_path / "run", steps=3, evaluations=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "name": name}))
    sample = {"prompt": "</pre><img src=x onerror=alert(1)>", "text": "\u0000\ud800", "domain": name}
    (folder / "samples.json").write_text(json.dumps([sample, "not a sample"]))
    (folder / "domains.json").write_text(json.dumps({"cc": name}))
    html = page_of(folder)
    assert fetches(html) == []
    assert not {"script", "img"} & set(Outline(html).tags)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("manifest.json", "[1]"),
        ("manifest.json", '{"model": 3, "platform": "cpu", "packages": null}'),
        ("config.yaml", "a: [1"),
        ("config.yaml", "data: 5"),
        ("summary.json", '{"heldout_loss": [1], "tokens": "many", "seconds": null}'),
        ("samples.json", "{}"),
        ("journal.jsonl", '{"kind": "mix", "first_sample": -1, "weights": {"a": "x"}}\n{"kind": "skip"}\n'),
        ("evals.jsonl", '{"step": 1, "consumed_tokens": null, "heldout_loss": {"a": "x"}}\n'),
        ("metrics.jsonl", '{"step": "one"}\n{"step": 1, "loss": "x", "stage": 3}\n'),
    ],
)
def test_no_file_can_keep_the_page_from_being_written(tmp_path: Path, file: str, text: str) -> None:
    folder = write_fake_run(tmp_path / "run", steps=2, evaluations=1)
    (folder / file).write_text(text)
    assert Outline(page_of(folder)).open == []


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (9000, []),
        (10**6, ["It has taken 365k of 1M tokens: the run is still going, or was stopped before its end."]),
    ],
)
def test_a_run_that_has_taken_all_of_its_tokens_is_not_called_stopped(tmp_path, tokens, said) -> None:
    folder = write_fake_run(tmp_path / "run", steps=30, evaluations=0, finished=False)
    append(folder / "config.yaml", f"curriculum:\n- tokens: {tokens - 100}\n- tokens: 100\n")
    html = page_of(folder)
    assert re.findall(r'class="notice"[^>]*>([^<]*)', html) == said
    assert "Time in steps" in html and "Wall time" not in html  # evaluations and saves are in no step


@pytest.mark.usefixtures("undrawn")
def test_a_run_whose_last_steps_were_passed_over_is_at_its_end(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", steps=30, evaluations=0, finished=False)
    append(folder / "config.yaml", "curriculum:\n- tokens: 1000000\n")
    consumed = int(read_run(folder).metrics["consumed_samples"][-1])
    for first, end in ((1900, 2000), (consumed, 1900)):
        skip = {"kind": "skip", "from_sample": first, "to_sample": end, "reason": "health: step 31"}
        append(folder / "journal.jsonl", json.dumps(skip) + "\n")
    said = "The steps behind the last one were passed over; journal.jsonl says why. The run is at its end."
    assert re.findall(r'class="notice"[^>]*>([^<]*)', page_of(folder)) == [said]


def test_a_folder_that_is_no_runs_gets_no_page(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of manifest\.json, "):
        write_run_report(tmp_path)
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a" / "config.yaml").touch()
    with pytest.raises(DataError, match=r"runs in it: a\n"):
        write_run_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no-such-run"):
        write_run_report(tmp_path / "no-such-run")


def test_where_the_time_goes(run):
    from megatron_davinci.report.phase_plots import phase_seconds_plot, phases_plot, seconds_caption

    story = RunStory(read_run(run))
    area = phases_plot(story)
    shares = {name: np.asarray(values) for name, _, values in area.bands}
    assert list(shares) == ["data", "forward", "backward", "gradient sync", "optimizer", "other"]
    assert np.allclose(sum(shares.values()), 1) and np.allclose(shares["backward"], 0.55)
    assert len(area.edges) == 61 and area.edges[-1] == story.consumed_tokens
    bars = {bar.name: bar for bar in phase_seconds_plot(story).bars}
    seconds = story.metrics["seconds"]
    assert bars["forward"].value == pytest.approx(0.29 * seconds.mean())
    assert (bars["forward"].low, bars["forward"].high) == (pytest.approx(0.1), pytest.approx(0.14))
    assert bars["backward"].low is None
    assert "checkpoint 10 s in all" in seconds_caption(story)
    assert "Where the time goes" in (run / "report.html").read_text()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("phases", [None, 3, {}, {"forward": "soon"}, {"forward": 0.0}])
def test_a_run_whose_phases_were_not_timed_has_no_such_section(tmp_path, phases):
    folder = write_fake_run(tmp_path / "run", steps=20)
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line |= {"phases": phases, "phases_by_rank": phases}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page, _ = run_page(RunStory(read_run(folder)))
    assert "Where the time goes" not in page.html()


@pytest.mark.usefixtures("undrawn")
def test_what_the_controller_said_is_on_the_page(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", steps=60)
    assert "The controller" not in page_of(folder)
    said = {
        "step": 20,
        "consumed_tokens": 160_000,
        "mode": "advise",
        "policy": "saturation",
        "present": {"general": "0.6", "code": "0.4"},
        "mixture": {"general": "0.55", "code": "0.45"},
        "reason": "general saturated (93%), code growing (99%)",
    }
    append(folder / "proposals.jsonl", json.dumps(said) + "\n")
    html = page_of(folder)
    assert "The controller" in html and "advice: training went on as planned" in html
    assert "general 60% → 55%, code 40% → 45%" in html and "general saturated (93%)" in html
    append(folder / "proposals.jsonl", '{"mixture": 3}\n{"pre')
    assert "The controller" in page_of(folder), "a damaged line does not take the page away"


def test_training_loss_by_domain_is_weighed_and_does_not_reach_over_a_stage(tmp_path):
    from megatron_davinci.report.run_plots import domain_loss_plot

    folder = write_fake_run(tmp_path / "run", steps=400)
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        first = line["stage"] == "1-1"
        line["sources"] = {"cc": {"loss": 5.0 if first else 2.0, "weight": 10}}
        if first:
            line["sources"] |= {
                "math_web": {"loss": 4.0, "weight": 30},
                "papers": {"loss": 8.0, "weight": 10},  # of the same domain
                "github": {"loss": None, "weight": 0},
            }
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    story = RunStory(read_run(folder))
    found = {one.name: np.asarray(one.y) for one in domain_loss_plot(story).series}
    first = np.array([line["stage"] == "1-1" for line in lines])
    assert set(found) == {"general", "science"}
    assert np.allclose(found["general"], np.where(first, 5.0, 2.0))
    assert np.allclose(found["science"][first], 5.0) and np.isnan(found["science"][~first]).all()


@pytest.mark.parametrize("sources", [None, 3, {}, {"a": 3}, {"a": {"loss": "x"}}, {"a": {"loss": 1.0}}])
def test_a_run_that_does_not_say_it_has_no_such_plot(tmp_path, sources):
    from megatron_davinci.report.run_plots import domain_loss_plot

    folder = write_fake_run(tmp_path / "run", steps=20)
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) | {"sources": sources} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert domain_loss_plot(RunStory(read_run(folder))) is None


def test_what_products_of_few_bits_lost(tmp_path):
    from megatron_davinci.report.precision_plots import lost_plot, lost_table, now_and_then_plot

    folder = write_fake_run(tmp_path / "run", steps=40)
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[9::10]:
        line["low_precision"] = {
            f"layers.{n}.linear_fc1": {
                operand: {
                    "amax": 3.0,
                    "scale": 2.0,
                    "underflow": 0.01 * n * line["step"] / 10,
                    "overflow": 0.001,
                }
                for operand in ("input", "gradient")
            }
            for n in range(3)
        }
    lines[29]["low_precision"] = {
        "layers.0.linear_fc1": {"input": {"amax": "soon"}},
        "layers.1.linear_fc1": 3,
    }
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    story = RunStory(read_run(folder))
    plot = lost_plot(story, "underflow")
    assert [one.name for one in plot.series] == ["input", "gradient"]
    assert list(plot.series[0].y) == pytest.approx([0.02, 0.04, 0.08])
    headers, rows = lost_table(story)
    assert rows[0] == ["layers.2.linear_fc1", "gradient", "3", "2", "8%", "0.1%"] and len(headers) == 6
    assert now_and_then_plot(story, "logit_sharpness") is None
    for number, line in enumerate(lines):
        line |= {"logit_sharpness": 0.1 * number} if number % 10 == 9 else {}
        line |= {"reference_gap": 0.02} if number > 30 else {}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    html, story = page_of(folder), RunStory(read_run(folder))
    assert "Low precision" in html and "layers.2.linear_fc1" in html
    assert "Sharpness of the logits" in html and "Loss over the reference" in html
    (sharp,) = now_and_then_plot(story, "logit_sharpness").series
    assert list(sharp.y) == pytest.approx([0.9, 1.9, 2.9, 3.9])
    assert len(now_and_then_plot(story, "reference_gap").series[0].y) == 9
