"""The doctor names what ended a run, what is good, and what to do; it changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import socket

import pytest

from megatron_davinci.config import dump_config
from megatron_davinci.data import Journal, MixRecord, SkipRecord
from megatron_davinci.train.checkpoint_files import begin, commit
from tests.cli.screen import davinci
from tests.tiny import tiny_config

HOST = socket.gethostname()
BEGAN, LATER = "2026-03-01T10:00:00Z", "2026-03-01T11:00:00Z"


def dead_pid():
    """Of a process that has just ended."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


class Run:
    """A run directory of 50 steps, two ranks and checkpoints of steps 10 and 20, that stopped at step 24."""

    def __init__(self, root):
        self.path = root / "run"
        config = tiny_config(root, checkpoint={"every_steps": 10})
        self.path.mkdir()
        (self.path / "config.yaml").write_text(dump_config(config))
        start = {"step": 0, "ranks": 2, "layout": "TP1 x PP1 x DP2 = 2 ranks", "device": "CPU", "time": BEGAN}
        self.write("manifest.json", {"starts": [start]})
        self.journal = Journal.open(self.path / "journal.jsonl")
        self.journal.append(MixRecord(0, "first", {"a": "0.75", "b": "0.25"}))
        for step in (10, 20):
            self.checkpoint(step)
        lines = [
            {"step": step, "stage": "first", "loss": 4.5, "grad_norm": 1.0, "consumed_tokens": step * 128}
            for step in range(1, 25)
        ]
        (self.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for rank in (0, 1):
            self.rank(rank)

    def write(self, name, value):
        (self.path / name).parent.mkdir(exist_ok=True)
        (self.path / name).write_text(json.dumps(value))

    def checkpoint(self, step):
        folder = begin(self.path / "checkpoints", step)
        (folder / "state" / "shard").write_bytes(bytes(range(256)) * 40)
        position = {"records": len(self.journal.records), "digest": self.journal.digest()}
        described = {"step": step, "consumed_samples": 4 * step, "model": {}, "journal": position}
        commit(folder, self.path / "checkpoints" / f"step-{step:08d}", described)

    def rank(self, rank, code=None, reason="", kind="", host=HOST, pid=None, **changes):
        ended = None if code is None else {"code": code, "kind": kind, "reason": reason, "time": LATER}
        facts = {"rank": rank, "ranks": 2, "host": host, "pid": pid or dead_pid(), "start": 1, "began": BEGAN}
        self.write(f"ranks/rank-{rank:05d}.json", {**facts, "ended": ended, **changes})

    def launcher(self, failures, memory=0):
        facts = {"host": HOST, "code": 137, "failures": failures, "killed_for_memory": memory, "time": LATER}
        self.write(f"ranks/launcher-{HOST}.json", facts)

    def asked(self, *arguments):
        screen = davinci("doctor", self.path, "--json", *arguments)
        return screen.code, json.loads(screen.out)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


LOST = "This rank lost another one, and cannot go on without it.\n  where:    rank 0"


def test_a_rank_that_was_killed_is_told_from_those_that_lost_it(run):
    run.rank(0, 5, LOST, "LostPeer")
    run.launcher({"1": -9, "0": 5}, memory=1)
    code, said = run.asked()
    assert (code, said["state"]) == (75, "died")
    assert f"rank 1 on {HOST}" in said["cause"][0] and "ended by signal 9" in said["cause"][0]
    assert said["cause"][1] == f"The kernel killed for want of memory on {HOST}."
    assert said["newest_good"]["step"] == 20 and said["newest_good"]["verified"]
    assert said["do"][0].startswith(
        "Start the same command again: it goes on after step 20; where it happens again"
    )
    screen = davinci("doctor", run.path)
    assert f"{run.path}: died" in screen.out and "4 steps after it will be taken again" in screen.out
    assert "by signal 9" in screen.out and "code 5, LostPeer" in screen.out


def test_ranks_that_leave_no_word_are_said_to(run):
    code, said = run.asked()
    assert (code, said["state"]) == (75, "died")
    assert "and 1 other left without a word, as after SIGKILL or the loss of a node" in said["cause"][0]


@pytest.mark.parametrize(
    ("code", "kind", "reason", "state", "exits"),
    [
        (75, "Stopped", "SIGTERM was heard by rank 1; step 20 is saved.", "asked to end", 75),
        (2, "EnvironmentProblem", "The disk is full: saving failed.\n  found:    0 bytes", "refused", 2),
        (3, "Unhealthy", "Steps are passed over again and again.", "in trouble", 2),
        (4, "", "A rank stands still, and the others wait for it.", "hung", 75),
        (6, "Corrupt", "Rank 1 computes other bits.", "computes wrong", 2),
        (1, "KeyError", "Traceback (most recent call last):\n  File x\nKeyError: 'tokens'\n", "died", 75),
    ],
)
def test_what_a_rank_said_is_the_cause(code, kind, reason, state, exits, run):
    run.rank(0, 131, "SIGQUIT: the launcher ended what was left of the run.")
    run.rank(1, code, reason, kind)
    found, said = run.asked()
    assert (found, said["state"]) == (exits, state)
    last = reason.strip().splitlines()[-1 if code == 1 else 0]
    assert last in " ".join(said["cause"])
    assert ("goes on after step 20" in said["do"][-1]) is True
    assert len(said["do"]) == (2 if exits == 2 else 1)


def test_a_run_at_work_and_a_complete_one_have_nothing_to_do(run):
    run.rank(1, pid=os.getpid())
    assert run.asked()[0] == 0 and run.asked()[1]["state"] == "at work"
    for rank in (0, 1):
        run.rank(rank, 0, "complete")
    run.checkpoint(50)
    code, said = run.asked()
    assert (code, said["state"], said["do"]) == (0, "complete", [])


def test_a_start_that_ended_before_it_was_on_record_is_the_last_one(run):
    run.rank(0, 2, "Source a is not there.", "DataError", start=None, began=LATER)
    code, said = run.asked()
    assert (code, said["state"]) == (2, "refused") and "Source a is not there." in said["cause"][0]


def test_damage_is_named_and_the_newest_good_state_is_the_one_before(run):
    shard = run.path / "checkpoints" / "step-00000020" / "state" / "shard"
    content = bytearray(shard.read_bytes())
    content[77] ^= 1
    shard.write_bytes(content)
    (run.path / "checkpoints" / ".step-00000030.tmp-ab" / "state").mkdir(parents=True)
    before = sorted(run.path.rglob("*"))
    code, said = run.asked()
    assert code == 75 and said["newest_good"]["step"] == 10
    assert (
        len(said["damaged"]) == 1 and "step-00000020" in said["damaged"][0] and "shard" in said["damaged"][0]
    )
    assert [one["folder"] for one in said["unfinished"]] == [".step-00000030.tmp-ab"]
    assert run.asked("--no-verify")[1]["newest_good"]["step"] == 20
    assert sorted(run.path.rglob("*")) == before, "it has changed nothing"
    older = run.path / "checkpoints" / "step-00000010" / "state" / "shard"
    older.write_bytes(b"")
    code, said = run.asked()
    assert code == 2 and said["newest_good"] is None and "Restore a checkpoint" in said["do"][0]


def test_a_checkpoint_that_the_run_turned_back_from_is_none_to_go_on_from(run):
    run.journal.append(SkipRecord(60, 64, "health: step 16, spike: loss 9"))
    event = {"step": 16, "kind": "spike", "found": "loss 9", "action": "rolled back", "samples": [60, 63]}
    (run.path / "health.jsonl").write_text(json.dumps({**event, "ranks": []}) + "\n")
    code, said = run.asked()
    assert said["newest_good"]["step"] == 10 and said["passed_over"] == 1 and code == 75
    assert (
        "step-00000020: it has trained on samples from 60 on" in said["aside"][0] if "aside" in said else True
    )
    screen = davinci("doctor", run.path).out
    assert "spike: loss 9" in screen and "rolled back" in screen


def test_a_run_whose_last_steps_are_passed_over_is_complete(run):
    run.journal.append(SkipRecord(80, 10_000, "health: nothing but trouble"))
    code, said = run.asked()
    assert (code, said["state"]) == (0, "complete")
    assert said["cause"] == ["Step 20 is saved, and those behind it, up to 50, are passed over."]


def test_a_run_that_ended_well_is_complete_whatever_became_of_its_checkpoints(run):
    lines = [{"step": step, "consumed_samples": 4 * step} for step in range(1, 51)]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for rank in (0, 1):
        run.rank(rank, 0, "the run, or what it was asked to do, is complete")
    code, said = run.asked()
    assert (code, said["state"], said["do"]) == (0, "complete", [])
    assert said["cause"] == ["It ended well after step 50; now the newest whole checkpoint is of step 20."]
    (run.path / "checkpoints" / "step-00000020" / "state" / "shard").write_bytes(b"")
    code, said = run.asked()
    assert (code, said["state"]) == (75, "complete") and "goes on after step 10" in said["do"][0]
    shutil.rmtree(run.path / "checkpoints")
    code, said = run.asked()
    assert (code, said["state"], said["do"]) == (0, "complete", [])
    assert "none of its checkpoints is there" in said["cause"][0]


def test_what_the_kernel_killed_in_an_earlier_start_is_no_cause_of_this_one(run):
    earlier = {"host": "node007", "code": 137, "failures": {"0": -9}, "killed_for_memory": 1}
    run.write("ranks/launcher-node007.json", {**earlier, "time": "2026-02-28T10:00:00Z"})
    code, said = run.asked()
    assert code == 75 and said["state"] == "died" and "memory" not in json.dumps([said["cause"], said["do"]])
    run.write("ranks/launcher-node007.json", {**earlier, "time": LATER})
    assert "The kernel killed for want of memory on node007." in run.asked()[1]["cause"]


def test_a_journal_that_the_newest_checkpoint_does_not_rest_on_is_damage(run):
    (run.path / "journal.jsonl").unlink()
    code, said = run.asked()
    assert code == 2 and said["damaged"] == ["journal.jsonl is not the one that step-00000020 was saved with"]
    assert said["do"][0].startswith("Restore the damaged file")


def test_a_branch_that_no_start_has_gone_on_with_is_not_begun(run):
    run.write("manifest.json", {"starts": [], "branched_from": {"run": "/runs/other", "step": 20}})
    shutil.rmtree(run.path / "ranks")
    code, said = run.asked()
    assert (code, said["state"], said["damaged"]) == (75, "not begun", [])
    assert said["do"] == ["Start it: davinci train CONFIG.yaml"] and said["newest_good"]["step"] == 20


def test_a_damaged_record_is_named(run):
    journal = run.path / "journal.jsonl"
    journal.write_text(journal.read_text().replace("0.75", "0.80"))
    code, said = run.asked()
    assert code == 2 and "A journal is damaged or was edited." in said["damaged"][0]
    (run.path / "manifest.json").write_text("{")
    assert any("manifest.json cannot be read" in line for line in run.asked()[1]["damaged"])


def test_a_run_on_other_nodes_is_known_by_its_lock(run):
    from megatron_davinci.train import last_words, run_lock

    assert (last_words.LOCK, last_words.STALE_SECONDS) == (run_lock.NAME, run_lock.STALE_SECONDS)
    for rank in (0, 1):
        run.rank(rank, host="elsewhere", pid=7)
    assert run.asked()[1]["state"] == "died"
    run.write("lock", {"host": "elsewhere", "pid": 7})
    code, said = run.asked()
    assert (code, said["state"]) == (0, "at work")
    os.utime(run.path / "lock", (0, 0))
    assert run.asked()[1]["state"] == "died"


def test_where_there_is_no_run_it_says_so(tmp_path):
    assert "There is no run to look at." in davinci("doctor", tmp_path / "nowhere").refusal()
    (tmp_path / "empty").mkdir()
    screen = davinci("doctor", tmp_path / "empty")
    assert screen.code == 75 and "not begun" in screen.out


def test_a_thousand_ranks_are_said_in_a_few_lines(run):
    run.write(
        "manifest.json",
        {"starts": [{"step": 0, "ranks": 1000, "layout": "DP1000", "device": "CPU", "time": BEGAN}]},
    )
    for rank in range(1000):
        run.rank(rank, 5, LOST, "LostPeer", host=f"node{rank // 8:03d}", pid=1)
    run.rank(417, host="node052", pid=99)
    screen = davinci("doctor", run.path).out
    assert "rank 417 on node052 (process 99) left without a word" in screen
    assert "0-416, 418-999" in screen and "node000 and 124 more" in screen
    assert len(screen.splitlines()) < 24


def test_what_keeps_untrusted_code_in_is_said():
    found = davinci("doctor", "--sandbox", "--json")
    said = json.loads(found.out)
    here = [way for way, why in said["ways"].items() if why is None]
    assert said["chosen"] == (here[0] if here else None) and found.code == (0 if here else 2)
    assert said["isolation"]["calls"] == "seccomp"
    screen = davinci("doctor", "--sandbox").out
    assert "namespaces" in screen and said["isolation"]["network"] in " ".join(screen.split())
    assert "one of them" in davinci("doctor", "--sandbox", "--kernels").refusal()
