"""What was measured of checkpoints, as lines over tokens."""

from __future__ import annotations

import json

import numpy as np

from megatron_davinci.report.run_tasks import read_tasks, task_plots, task_table


def record(tokens: int, task: str, protocol: str, metrics: dict, **more) -> str:
    return (
        json.dumps({"tokens": tokens, "task": task, "protocol": protocol, "metrics": metrics, **more}) + "\n"
    )


def test_the_last_record_of_a_checkpoint_counts_and_what_has_no_result_is_left_out(tmp_path):
    (tmp_path / "evals").mkdir()
    means = {"General": {"score": 40.0, "missing": []}, "Code": {"score": 1.0, "missing": ["MBPP"]}}
    (tmp_path / "evals/results.jsonl").write_text(
        record(200, "a", "likelihood", {"acc,none": 0.5, "acc_norm,none": 0.6}, errors={"acc_norm,none": 0.1})
        + record(100, "a", "likelihood", {"acc,none": 0.1, "acc_norm,none": 0.2})
        + record(
            100, "a", "likelihood", {"acc,none": 0.2, "acc_norm,none": 0.3}, errors={"acc_norm,none": 0.2}
        )
        + record(100, "b", "generation", {}, problem="no data")
        + json.dumps({"tokens": 100, "suite": "davinci19", "means": means})
        + "\n"
        + '{"tokens": 300, "task'
    )
    found = {line.task: line for line in read_tasks(tmp_path)}
    assert found.keys() == {"a", "General"}
    line = found["a"]
    assert line.metric == "acc_norm"
    assert (line.tokens.tolist(), line.values.tolist(), line.errors.tolist()) == (
        [100, 200],
        [0.3, 0.6],
        [0.2, 0.1],
    )
    (plot,) = task_plots([line], [])
    np.testing.assert_allclose(plot.series[0].y, [30, 60])
    np.testing.assert_allclose(plot.series[0].band, [39.2, 19.6])
    assert not plot.half
    # Many bands would lie over each other: they are drawn by twos, side by side.
    by_twos = task_plots([line] * 3, [])
    assert [len(one.series) for one in by_twos] == [2, 1]
    for one in by_twos:
        assert one.half and all(series.band is not None for series in one.series)
    assert "by likelihood" in plot.title
    header, rows = task_table([line], lambda values: 7.0)
    assert rows == [["a", "likelihood", "acc_norm", "0.3", "0.6 ± 0.1", "2", "7.0"]]
    assert len(header) == len(rows[0])


def test_bytes_that_are_no_text_leave_the_other_lines(tmp_path):
    (tmp_path / "evals").mkdir()
    lines = record(100, "a", "likelihood", {"acc,none": 0.5}).encode()
    (tmp_path / "evals/results.jsonl").write_bytes(b'{"task": "caf\xe9", "tok\n' + lines + b'{"task": "\xc3')
    assert [line.task for line in read_tasks(tmp_path)] == ["a"]


def test_a_measure_that_is_no_share_of_items_has_a_plot_of_its_own(tmp_path):
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals/results.jsonl").write_text(
        "".join(
            record(tokens, "a", "generation", {"exact_match,none": 0.5})
            + record(tokens, "b", "generation", {"bleu,none": 21.5})
            for tokens in (100, 200)
        )
    )
    shares, bleu = task_plots(read_tasks(tmp_path), [])
    assert (shares.y.unit, list(shares.series[0].y)) == ("%", [50, 50])
    assert (bleu.y.caption, list(bleu.series[0].y)) == ("bleu", [21.5, 21.5])
    assert bleu.title == "Benchmarks, by generation: bleu"


def test_a_look_at_a_few_items_hides_no_full_result_and_is_called_one(tmp_path):
    (tmp_path / "evals").mkdir()
    acc = {"acc,none": 0.5}
    (tmp_path / "evals/results.jsonl").write_text(
        record(100, "a", "likelihood", acc, shots=0, limit=None, items=1000)
        + record(100, "a", "likelihood", {"acc,none": 1.0}, shots=0, limit=2, items=2)
        + record(200, "a", "likelihood", {"acc,none": 0.75}, shots=0, limit=4, items=4)
        + record(200, "a", "likelihood", {"acc,none": 0.0}, shots=0, limit=2, items=2)
        + record(200, "b", "likelihood", acc, shots=0, limit=None, items=9)
        + record(200, "b", "likelihood", {"acc,none": 0.25}, shots=5, limit=None, items=9, given={"shots": 5})
        + record(200, "c", "likelihood", {"acc_norm,none": 0.5}, shots=3, suite="local", limit=2, items=2)
    )
    in_training = {"c": {"items": 40, "acc_norm": 0.4}, "d": {"items": 40, "acc_norm": 0.1}}
    (tmp_path / "evals.jsonl").write_text(json.dumps({"consumed_tokens": 200, "tasks": in_training}))
    lines = read_tasks(tmp_path)
    _, rows = task_table(lines, None)
    assert {row[0]: row[3:5] for row in rows} == {
        "a": ["0.5", "0.75 (4 items)"],
        "b (0-shot)": ["0.5", "0.5"],
        "b (5-shot)": ["0.25", "0.25"],
        "c": ["0.4 (40 items)"] * 2,
        "d": ["0.1 (40 items)"] * 2,
    }
    (plot,) = task_plots(lines, [])
    assert plot.note == "a: with a limit at 1 of 2 checkpoints"


def test_a_run_without_results_has_none(tmp_path):
    assert read_tasks(tmp_path) == []
