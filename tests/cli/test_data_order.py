"""`davinci data order` says what the run does: the same tokens, the same step, the same rank; and only reads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_davinci.config import load_config
from megatron_davinci.data import Batches, Journal, MixRecord, SkipRecord
from megatron_davinci.data.indexed_writer import IndexedDatasetWriter
from megatron_davinci.data.tokenize import tokenize_jsonl
from megatron_davinci.data.tokenizer import Tokenizer, train_bpe
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train.planned import open_sources
from tests.cli.screen import Screen, davinci, davinci_on_a_rank
from tests.tiny import LENGTH, tiny_settings, write_source

STEPS = 34  # of 50: both stages have begun
TOTAL, DONE = 352, 224


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The configuration of a run that stopped in its second stage; its small sources go through several epochs."""
    root = tmp_path_factory.mktemp("order")
    for seed, name in enumerate(("a", "b")):
        write_source(root / "data" / name, name, seed, documents=12)
    config = root / "config.yaml"
    settings = tiny_settings(root, checkpoint={"every_steps": 1000}, train={"stop_after_steps": STEPS})
    settings["data"]["validation"] = {}
    config.write_text(yaml.safe_dump(settings))
    screen = davinci_on_a_rank("train", config)
    assert screen.code == 0, screen.err
    return config


@pytest.fixture
def fresh(trained, tmp_path) -> tuple[Path, str]:
    """The same configuration before its run: a run directory where nothing is."""
    return trained, f"run.directory={tmp_path / 'new'}"


@pytest.fixture
def copied(trained, tmp_path) -> tuple[Path, str]:
    """The same run in a directory that a test may spoil."""
    shutil.copytree(trained.parent / "run", tmp_path / "run")
    return trained, f"run.directory={tmp_path / 'run'}"


def order(*words: object) -> Screen:
    return davinci("data", "order", *words)


def answer(*words: object) -> dict[str, Any]:
    screen = order(*words, "--json")
    assert (screen.code, screen.err) == (0, "")
    return json.loads(screen.out)


def loaded(config: Path) -> np.ndarray:
    """The tokens of every sample of the run as the trainer reads them: [samples, sequence_length + 1]."""
    from megatron_davinci.train.order import DataOrder
    from megatron_davinci.train.run_directory import RunDirectory

    settings = load_config(config)
    schedule, sources = Schedule(settings.curriculum, LENGTH), open_sources(settings)
    path = settings.run.directory / "journal.jsonl"
    before = path.read_bytes()
    order = DataOrder(settings, schedule, sources, RunDirectory(settings.run.directory))
    order.prepare(schedule.at(schedule.total_samples - 8))
    assert path.read_bytes() == before, "the run had written every record"
    return Batches(order.curriculum, sources).read(np.arange(schedule.total_samples)).tokens


# ---- what it says ----------------------------------------------------------------------------------------


def test_every_sample_is_what_the_trainer_reads(trained):
    said = answer(trained, "--at", 0, "--count", TOTAL, "--full-text")["samples"]
    assert [sample["n"] for sample in said] == list(range(TOTAL))
    assert [sample["window"]["ids"]["first"] for sample in said] == loaded(trained).tolist()
    for sample in said:
        window = sample["window"]
        first, end = window["bytes"]
        assert end - first == 2 * (LENGTH + 1) and window["dtype"] == "uint16"
        in_file = np.frombuffer(Path(window["file"]).read_bytes()[first:end], "<u2")
        assert in_file.tolist() == window["ids"]["first"]
        assert [2 * token for token in window["tokens"]] == window["bytes"]
        assert window["documents"][0]["in_window"][0] == 0
        assert window["documents"][-1]["in_window"][1] == LENGTH + 1


def test_a_run_is_told_before_it_begins_as_it_will_be(trained, fresh):
    before, after = (answer(*words, "--at", 0, "--count", TOTAL) for words in (fresh, (trained,)))
    assert {s["record"]["from"] for s in before["samples"]} == {"config"}
    assert {s["record"]["from"] for s in after["samples"]} == {"journal"}
    for sample in (*before["samples"], *after["samples"]):
        del sample["record"]["from"], sample["record"]["number"], sample["done"]
    assert before["samples"] == after["samples"]
    assert "has no journal yet" in before["notes"][0]
    assert "no journal" not in str(after["notes"])


def test_the_clock_and_the_record(trained):
    for n in (0, 47, 48, 191, 192, DONE - 1, DONE, TOTAL - 1):
        (sample,) = answer(trained, "--at", n)["samples"]
        stage, number, first = ("first", 0, 0) if n < 192 else ("second", 1, 192)
        assert (sample["stage"], sample["tokens_before"]) == (stage, n * LENGTH)
        record = sample["record"]
        assert (record["number"], record["first_sample"], record["stage"]) == (number, first, stage)
        assert record["weights"] == ({"a": "0.75", "b": "0.25"} if n < 192 else {"a": "0.2", "b": "0.8"})
        assert sample["source"]["share"] == float(record["weights"][sample["source"]["name"]])
        step = n // 4 + 1 if n < 48 else (n - 48) // 8 + 13
        assert sample["step"] == step
        assert sample["batch"]["size"] == (4 if n < 48 else 8)
        assert sample["batch"]["first_sample"] + sample["batch"]["row"] == n
        assert sample["done"] is (n < DONE)


def test_positions_count_the_samples_of_a_source(trained):
    seen = {"a": 0, "b": 0}
    for sample in answer(trained, "--at", 0, "--count", TOTAL)["samples"]:
        source = sample["source"]
        assert source["position"] == seen[source["name"]]
        assert source["epoch"] == source["position"] // source["windows"]
        seen[source["name"]] += 1
    assert min(seen.values()) > 2 * 40, "several epochs"


def test_ranks_and_micro_batches_are_those_of_the_trainer(trained):
    from megatron_davinci.train.feed import rank_samples

    layout = ("--ranks", 2, "--at", 40, "--count", 64)
    said = {s["n"]: s for s in answer(trained, *layout)["samples"]}
    for first, batch in ((40, 4), (44, 4), *((n, 8) for n in range(48, 104, 8))):
        for rank in range(2):
            taken = rank_samples(first, batch, data_rank=rank, data_ranks=2, micro_batch_size=2)
            for place, n in enumerate(taken.tolist()):
                expected = {"data_rank": rank, "micro_batch": place // 2, "row": place % 2}
                assert said[n]["rank"] == expected


def test_the_layout_is_that_of_the_last_start(trained, fresh, copied, tmp_path):
    assert answer(trained, "--at", 0)["run"]["layout_from"] == "the last start"
    assert answer(*fresh, "--at", 0)["run"]["layout_from"] == "the smallest"
    manifest = tmp_path / "run" / "manifest.json"
    facts = json.loads(manifest.read_text())
    facts["platform"]["ranks"] = 2
    manifest.write_text(json.dumps(facts))
    assert answer(*copied, "--at", 0)["run"]["layout"] == "TP1 x PP1 x DP2 = 2 ranks"
    facts["platform"]["ranks"] = 3  # on which nothing divides: another layout was configured since
    manifest.write_text(json.dumps(facts))
    assert answer(*copied, "--at", 0)["run"]["layout_from"] == "the smallest"


def test_a_step_is_its_global_batch(trained):
    for step, first, size in ((1, 0, 4), (12, 44, 4), (13, 48, 8), (31, 192, 8), (50, 344, 8)):
        samples = answer(trained, "--step", step)["samples"]
        assert [sample["n"] for sample in samples] == list(range(first, first + size))
        assert {sample["step"] for sample in samples} == {step}
    assert len(answer(trained, "--step", 13, "--count", 3)["samples"]) == 3


def test_a_skip_is_said(copied, tmp_path):
    Journal.open(tmp_path / "run" / "journal.jsonl").append(SkipRecord(300, 310, "a spike"))
    samples = answer(*copied, "--at", 298, "--count", 14)["samples"]
    left = [sample["n"] for sample in samples if sample["left_out"]]
    assert left == list(range(300, 310))
    assert samples[2]["left_out"] == {"record": 2, "reason": "a spike"}
    screen = order(*copied, "--at", 300).out
    assert "by record 2 of the journal: a spike" in screen and "(left out)" in screen
    window = "{name}:{number}".format(**samples[2]["source"], number=samples[2]["window"]["number"])
    found = {one["n"]: one["left_out"] for one in answer(*copied, "--find", window)["seen"]}
    assert (
        found[300] == {"record": 2, "reason": "a spike"}
        and list(found.values()).count(None) == len(found) - 1
    )
    assert "left out" in order(*copied, "--find", window).out


def test_later_records_of_the_journal_govern(fresh, tmp_path):
    """A journal that goes beyond the plan, as a policy that adapts the mixture writes it."""
    journal = Journal.open(tmp_path / "new" / "journal.jsonl")
    journal.append(MixRecord(0, "first", {"a": "0.75", "b": "0.25"}))
    journal.append(MixRecord(64, "first", {"a": "1", "b": "0"}))
    samples = answer(*fresh, "--at", 0, "--count", TOTAL)["samples"]
    assert {s["source"]["name"] for s in samples[64:192]} == {"a"}
    assert samples[64]["record"]["number"] == 1 and samples[63]["record"]["number"] == 0
    assert samples[192]["record"]["from"] == "config" and samples[192]["record"]["number"] is None


# ---- finding ---------------------------------------------------------------------------------------------


def test_what_is_found_is_what_is_there(trained):
    samples = answer(trained, "--at", 0, "--count", TOTAL)["samples"]
    windows = samples[0]["source"]["windows"]
    name = samples[0]["source"]["name"]
    for window in range(0, windows, 5):
        found = answer(trained, "--find", f"{name}:{window}", "--count", 100)
        expected = [
            (s["source"]["epoch"], s["n"], s["step"])
            for s in samples
            if (s["source"]["name"], s["window"]["number"]) == (name, window)
        ]
        assert [(one["epoch"], one["n"], one["step"]) for one in found["seen"]] == expected
        assert found["times"] == len(expected) >= 3
        assert found["window"]["number"] == window
        short = answer(trained, "--find", f"{name}:{window}", "--count", 2)
        assert short["seen"] == found["seen"][:2] and short["times"] == found["times"]
    more = order(trained, "--find", f"{name}:0", "--count", 1).out
    times = answer(trained, "--find", f"{name}:0")["times"]
    assert f"seen in {times} samples; the run has done 224 of 352" in more
    assert f"and {times - 1} more; --count {times} has all" in more


def test_a_document_is_found_in_all_of_its_windows(trained):
    samples = answer(trained, "--at", 0, "--count", TOTAL)["samples"]
    for number in (0, 5, 11):
        found = answer(trained, "--find-document", f"b:0:{number}", "--count", 1000)
        expected = sorted(
            (s["source"]["epoch"], s["n"])
            for s in samples
            if s["source"]["name"] == "b" and number in [d["number"] for d in s["window"]["documents"]]
        )
        assert [(one["epoch"], one["n"]) for one in found["seen"]] == expected != []
        assert found["times"] == len(expected)
        first, end = found["document"]["tokens"]
        shard = np.fromfile(found["document"]["file"], "<u2")
        begins = found["document"]["begins"]["ids"]["first"]
        assert begins == shard[first : first + len(begins)].tolist()
        assert 60 <= len(begins) <= end - first
        assert found == answer(trained, "--find-document", f"b:shard-00000:{number}", "--count", 1000)


def test_what_is_never_seen(fresh, tmp_path):
    words = (*fresh, "curriculum.0.mixture={a: 1, b: 0}", "curriculum.1.mixture={a: 1, b: 0}")
    found = answer(*words, "--find", "b:3")
    assert (found["times"], found["seen"], found["source"]["samples"]) == (0, [], 0)
    assert "never seen in this run" in order(*words, "--find", "b:3").out
    with IndexedDatasetWriter(tmp_path / "x", "uint16") as writer:
        for length in (LENGTH + 1, 0, 5):
            writer.add_document(np.arange(length))
    words = (*fresh, f"data.sources.a.path={tmp_path / 'x'}")
    assert answer(*words, "--find-document", "a:0:0", "--count", 1)["times"] > 100
    for number in (1, 2):
        assert answer(*words, "--find-document", f"a:0:{number}")["times"] == 0
        assert "none: an empty document" in order(*words, "--find-document", f"a:0:{number}").out


# ---- the screen ------------------------------------------------------------------------------------------


def test_the_screen_says_it_all(trained, monkeypatch):
    sample = answer(trained, "--at", 200)["samples"][0]
    screen = order(trained, "--at", 200).out
    window = sample["window"]
    for shown in (
        f"sample 200 is window {window['number']} of {sample['source']['name']}, read in step 32 of 50 (done)",
        "200 of 352 samples before it, 6,400 tokens (6.4k)",
        "row 0 of 8 in the batch that begins at sample 200",
        "1, line 2 of ",
        "journal.jsonl: from sample 192 on, a 20%, b 80%",
        f"{window['bytes'][0]:,} to {window['bytes'][1]:,} of the file",
        "all of 32 labels carry it",
        "data.tokenizer is not set: tokens are shown by their ids",
        " ".join(map(str, window["ids"]["first"])),
    ):
        assert shown in screen
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        for words in (
            ("--at", 200),
            ("--at", 190, "--count", 5),
            ("--find", "a:3"),
            ("--find-document", "a:0:1"),
        ):
            lines = order(trained, *words).out.splitlines()
            assert max(map(len, lines)) <= columns and not any(line.endswith(" ") for line in lines)


def test_a_table_has_a_line_a_sample(trained):
    lines = order(trained, "--at", 186, "--count", 12).out.splitlines()
    assert lines[0] == "samples 186 to 197 of 352, steps 30 to 31"
    assert lines[1].split() == ["n", "step", "stage", "source", "epoch", "window", "shard", "begins", "with"]
    assert [line.split()[:3] for line in lines[2:14]] == [
        [str(n), str(30 if n < 192 else 31), "first" if n < 192 else "second"] for n in range(186, 198)
    ]
    assert len(order(trained, "--at", 350, "--count", 12).out.splitlines()) == 2 + 2 + 2, "the run ends"


class TestText:
    TEXT = (
        "\x1b[31mred\x07 \u202ebidi\u202c żółw 漢字\r\n" + "A line of words that goes on for a while. " * 40
    )

    @pytest.fixture
    def config(self, tmp_path) -> Path:
        (tmp_path / "t.jsonl").write_text(
            json.dumps({"text": self.TEXT}) + "\n" + json.dumps({"text": "two"}) + "\n"
        )
        train_bpe([tmp_path / "t.jsonl"], 300, tmp_path / "tokenizer")
        tokenizer = Tokenizer.load(tmp_path / "tokenizer")
        for name in ("a", "b"):
            tokenize_jsonl([tmp_path / "t.jsonl"], tokenizer, tmp_path / "data" / name, name, name)
        settings = tiny_settings(tmp_path)
        settings["model"] |= {"vocab_size": 320, "max_sequence_length": 256}
        settings["data"] |= {
            "sequence_length": 256,
            "tokenizer": str(tmp_path / "tokenizer"),
            "validation": {},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        return tmp_path / "config.yaml"

    def test_is_decoded_and_a_terminal_is_safe(self, config):
        found = answer(config, "--find-document", "a:0:0")
        assert self.TEXT.startswith(found["document"]["begins"]["text"]["first"][:200])
        screen = order(config, "--find", "a:0").out
        assert r"\x1b[31mred\x07 \u202ebidi\u202c żółw 漢字\r" in screen
        assert not set("\x1b\x07\u202e\r") & set(screen)
        assert "the first 300 and the last 100" in screen
        whole = answer(config, "--find", "a:0", "--full-text")["window"]["text"]
        assert self.TEXT.startswith(whole["first"]) and len(whole["first"]) == whole["characters"] > 400
        assert "the first" not in order(config, "--find", "a:0", "--full-text").out

    def test_of_another_tokenizer_is_said(self, config, tmp_path):
        (tmp_path / "u.jsonl").write_text(
            json.dumps({"text": "quite other words, and other pieces " * 9}) + "\n"
        )
        train_bpe([tmp_path / "u.jsonl"], 270, tmp_path / "other")
        out = order(config, f"data.tokenizer={tmp_path / 'other'}", "--at", 0).out
        assert "made with another tokenizer than data.tokenizer" in out
        assert "another tokenizer" not in order(config, "--at", 0).out

    def test_of_a_tokenizer_that_is_gone(self, config, tmp_path):
        text = order(config, f"data.tokenizer={tmp_path / 'none'}", "--at", 0).refusal()
        assert "The tokenizer cannot be read." in text


def test_the_values_of_an_answer(trained):
    """The JSON's fields, which programs rest on."""
    one = answer(trained, "--at", 5)
    assert set(one) == {"run", "samples", "notes"}
    assert set(one["run"]) == {
        "directory", "seed", "sequence_length", "samples", "steps", "journal_records", "done_samples", "layout",
        "layout_from",
    }  # fmt: skip
    assert (one["run"]["samples"], one["run"]["steps"], one["run"]["done_samples"]) == (TOTAL, 50, DONE)
    (sample,) = one["samples"]
    when = {"n", "tokens_before", "stage", "step", "learning_rate", "batch", "rank", "done", "left_out"}
    assert set(sample) == when | {"record", "source", "window", "transforms"}
    assert set(sample["source"]) == {"name", "share", "position", "epoch", "windows"}
    assert set(sample["window"]) == {
        "number", "shard", "shards", "file", "bytes", "tokens", "dtype", "documents", "labels", "labels_with_loss",
        "has_mask", "text", "ids",
    }  # fmt: skip
    assert set(sample["transforms"]) == {"applied", "tokens_cut", "labels_with_loss", "text", "ids"}
    found = answer(trained, "--find-document", "a:0:3")
    assert set(found) == {"run", "sought", "window", "document", "source", "times", "seen", "notes"}
    assert set(found["seen"][0]) == when | {"epoch", "window"}


def test_a_mask_is_counted(fresh, tmp_path):
    with IndexedDatasetWriter(tmp_path / "m", "uint16", mask=True) as writer:
        for _ in range(20):
            writer.add_document(np.arange(LENGTH), loss=np.arange(LENGTH) >= 8)
    words = (*fresh, f"data.sources.a.path={tmp_path / 'm'}")
    window = answer(*words, "--find", "a:4")["window"]
    assert (window["has_mask"], window["labels"], window["labels_with_loss"]) == (True, LENGTH, LENGTH - 8)
    assert "24 of 32 labels carry it, by the source's mask" in order(*words, "--find", "a:4").out


# ---- it only reads ---------------------------------------------------------------------------------------


def everything_in(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


def test_nothing_is_written(trained, fresh, in_tmp):
    before = everything_in(trained.parent)
    for words in (("--at", 3), ("--at", 3, "--count", 2), ("--find", "a:1"), ("--find-document", "a:0:1")):
        assert order(trained, *words).code == order(*fresh, *words).code == 0
    assert everything_in(trained.parent) == before
    assert list(in_tmp.iterdir()) == []


def test_a_run_may_be_writing_at_this_moment(copied, tmp_path):
    journal, metrics = tmp_path / "run" / "journal.jsonl", tmp_path / "run" / "metrics.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + lines[1][:40])
    content = metrics.read_bytes()
    metrics.write_bytes(content[: content.rstrip().rfind(b"\n") + 30])
    before = everything_in(tmp_path)
    said = answer(*copied, "--at", 192)
    assert said["samples"][0]["record"]["from"] == "config", (
        "a half-written record has not governed a sample yet"
    )
    assert said["run"]["done_samples"] == DONE - 8
    assert everything_in(tmp_path) == before
    metrics.write_bytes(b"")
    assert answer(*copied, "--at", 192)["samples"][0]["done"] is None


def test_it_does_without_torch(trained):
    code = (
        "import sys\nfrom megatron_davinci.cli.main import main\n"
        f"assert main(['data', 'order', {str(trained)!r}, '--at', '7']) == 0\n"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sample 7 is window ")


def test_a_reader_may_have_had_enough(trained):
    command = [sys.executable, "-m", "megatron_davinci.cli.main", "data", "order", str(trained), "--at", "0"]
    with subprocess.Popen(
        [*command, "--count", str(TOTAL), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"{\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


# ---- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--at", TOTAL), "0 to 351: the run has 352 samples in 50 steps"),
        (("--at", 10**18), "The run has no such sample."),
        (("--at", -1), "found:    -1"),
        (("--step", 51), "1 to 50"),
        (("--step", 0), "The run has no such step."),
        (("--at", 0, "--count", 0), "1 to 10,000"),
        (("--at", 0, "--count", 10_001), "locate_many"),
        (("--at", "x"), "usage: "),
        (("--at", 0, "--find", "a:0"), "not allowed with"),
        ((), "one of the arguments --at --step --find --find-document is required"),
        (("--find", "a"), "SOURCE:WINDOW"),
        (("--find", "a:"), "SOURCE:WINDOW"),
        (("--find", "a:-1"), "This is no number."),
        (("--find", "a:1000"), "Source a has no such window."),
        (("--find", "c:0"), "one of a, b"),
        (("--find-document", "a:0"), "SOURCE:SHARD:DOCUMENT"),
        (("--find-document", "a:1:0"), "Source a has no such shard."),
        (("--find-document", "a:0:12"), "0 to 11"),
        (("--at", 0, "--ranks", 3), "The layout is impossible."),
        (("--at", 0, "run.seed=8"), "seed: 7 on record, 8 as configured"),
        (("--at", 0, "data.sequence_length=16"), "sequence_length: 32 on record, 16 as configured"),
        (("--at", 0, "curriculum.0.mixture={a: 0.5, b: 0.5}"), "stage first is over; its mixture: a 0.75, b 0.25"),
        (("--at", 0, "curriculum.0.tokens=8k"), "its past is sealed"),
        (("--at", 0, "curriculum.1.name=other"), "no step of a stage second as configured"),
    ],
)  # fmt: skip
def test_what_is_asked_wrongly(trained, words, said):
    assert said in order(trained, *words).refusal()


def test_a_stage_of_the_journal_that_the_configuration_lacks(trained, tmp_path):
    settings = yaml.safe_load(trained.read_text())
    del settings["curriculum"][1]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    text = order(tmp_path / "config.yaml", "--at", 0).refusal()
    assert "line 2" in text and "no step of a stage second as configured" in text


def test_a_damaged_journal(copied, tmp_path):
    path = tmp_path / "run" / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b"0.75", b"0.74"))
    text = order(*copied, "--at", 0).refusal()
    assert "A journal is damaged or was edited." in text and "line 1" in text


def test_a_damaged_manifest_of_the_run(copied, tmp_path):
    for content in (b"{", b"[]"):
        (tmp_path / "run" / "manifest.json").write_bytes(content)
        assert "manifest" in order(*copied, "--at", 0).refusal()


def test_another_source_than_the_runs(trained, tmp_path):
    other = write_source(tmp_path / "other", "a", seed=9, documents=12)
    text = order(trained, f"data.sources.a.path={other}", "--at", 0).refusal()
    assert "source a: other content than on record" in text


def test_a_source_that_is_not_there(fresh, tmp_path):
    text = order(*fresh, f"data.sources.b.path={tmp_path / 'nowhere'}", "--at", 0).refusal()
    assert "Source b is not there." in text


def test_a_shard_that_is_gone(fresh, tmp_path):
    folder = write_source(tmp_path / "gone", "a", seed=0, documents=12)
    (folder / "shard-00000.bin").unlink()
    text = order(*fresh, f"data.sources.a.path={folder}", "--find", "a:0").refusal()
    assert "shard-00000.bin" in text
