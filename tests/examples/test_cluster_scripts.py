"""The scripts for clusters do what they say, with two nodes on this machine and stand-ins for Slurm's commands."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess

import pytest
import yaml

from benchmarks.common import free_port
from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.train import agent
from tests.examples.cluster import SCRIPTS, Cluster, finish, outside, wait_until
from tests.ranks import run_ranks
from tests.tiny import LENGTH, VOCABULARY, tiny_settings, train_here

TORCHRUN = SCRIPTS / "torchrun.sh"
CPU = {"DEVICE": "cpu", "RANKS_PER_NODE": "1", "INTERFACE": "lo", "LOCAL_ADDR": "127.0.0.1"}


@pytest.fixture
def slurm(tmp_path):
    """Makes the cluster of a test, and ends what the test left running."""
    made = []

    def make(**settings):
        made.append(Cluster(tmp_path / "slurm", **settings))
        return made[-1]

    yield make
    for cluster in made:
        cluster.end()


def settings_of(root, run):
    """The `tiny` preset on the tests' data: 16 steps, a checkpoint at every fourth."""
    return tiny_settings(
        root,
        run={"directory": str(run), "seed": 7},
        model=None,
        checkpoint={"every_steps": 4},
        train={"stop_after_steps": 16},
    ) | {"model": {"preset": "tiny", "vocab_size": VOCABULARY, "max_sequence_length": LENGTH}}


def written(path, settings):
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def numbers(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(m["step"], m["consumed_samples"], m["loss"], m["grad_norm"], m["learning_rate"]) for m in lines]


def steps_on_record(run):
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


# ---- the whole way ---------------------------------------------------------------------------------------


# Node 0 is the rendezvous as well, and has the rank that writes the record.
@pytest.mark.long
@pytest.mark.parametrize("lost", [1, 0])
def test_a_job_that_lost_a_node_is_requeued_and_is_the_run_that_would_have_been(lost, slurm, tmp_path):
    run_ranks(2, train_here, settings_of(tmp_path, tmp_path / "whole"))
    run = tmp_path / "run"
    config = written(tmp_path / "config.yaml", settings_of(tmp_path, run))
    cluster = slurm(**CPU, REQUEUE_AFTER="0")

    job = cluster.sbatch(config)
    # Of a step, once its save in the background is on the disk too.
    wait_until(lambda: steps_on_record(run) >= 6 and any((run / "checkpoints").glob("step-*")), job)
    cluster.kill(lost)
    code, said = finish(job)
    assert steps_on_record(run) < 16, "the job was done before its node was killed"
    survivor = cluster.log(1 - lost)
    assert "error: This rank lost another one, and cannot go on without it." in survivor
    assert re.search(rf"where: +rank [01] of 2 on {socket.gethostname()}\n  found: +\S", survivor)
    assert "Traceback" not in survivor
    # The node that lives found out, ended, and the job went back into the queue: it has not failed.
    assert (code, cluster.requeued) == (0, [cluster.environment["SLURM_JOB_ID"]]), said
    assert "start 1, on 127.0.0.1 127.0.0.1" in said and "back into the queue" in said

    code, said = finish(cluster.sbatch(config))
    assert code == 0, said + cluster.log(0) + cluster.log(1)
    assert "start 2," in said and said.rstrip().endswith("done")
    assert len(cluster.requeued) == 1
    starts = json.loads((run / "manifest.json").read_text())["starts"]
    assert starts[0]["step"] == 0 and starts[1]["step"] in (4, 8, 12)
    assert f"Going on after step {starts[1]['step']}" in cluster.log(0) + cluster.log(1)
    assert [start["ranks"] for start in starts] == [2, 2]
    assert numbers(run) == numbers(tmp_path / "whole")


# ---- slurm.sbatch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks_end_with", "requeue_after", "code", "requeued"),
    [
        (0, 0, 0, False),
        (2, 0, 2, False),
        (3, 0, 3, False),
        (6, 0, 6, False),
        (75, 600, 0, True),
        (137, 0, 0, True),
        (1, 0, 0, True),
        (1, 600, 1, False),
    ],
    ids=["done", "refused", "unhealthy", "corrupt", "saved", "killed", "failed", "failed at once"],
)
def test_what_the_job_does_when_its_ranks_end(slurm, ranks_end_with, requeue_after, code, requeued):
    cluster = slurm(FAKE_SRUN=f"exit {ranks_end_with}", REQUEUE_AFTER=str(requeue_after))
    ended, said = finish(cluster.sbatch("config.yaml"))
    assert (ended, bool(cluster.requeued)) == (code, requeued), said


@pytest.mark.parametrize(
    ("number", "says", "ends", "requeued"),
    [
        ("USR1", "the time limit is near", 0, 1),
        ("TERM", "Slurm ends this job", 75, 0),
    ],
)
def test_a_job_that_is_near_its_end_has_its_ranks_save(number, says, ends, requeued, slurm):
    # What Slurm ends, it requeues by itself, after preemption; after scancel nobody should.
    fake = (
        'trap "echo saved >> $FAKE_SLURM/saved; exit 75" USR1; touch "$FAKE_SLURM/running"; '
        # What it leaves must not hold the pipe that the test reads to its end.
        "sleep 60 > /dev/null 2>&1 & wait"
    )
    cluster = slurm(FAKE_SRUN=fake)
    job = cluster.sbatch("config.yaml")
    wait_until((cluster.folder / "running").exists, job)
    job.send_signal(signal.Signals[f"SIG{number}"])
    code, said = finish(job)
    assert code == ends and says in said
    assert (cluster.folder / "saved").read_text() == "saved\n"
    assert len(cluster.requeued) == requeued


@pytest.mark.long
def test_a_job_that_slurm_warns_loses_no_step(slurm, tmp_path):
    run_ranks(2, train_here, settings_of(tmp_path, tmp_path / "whole"))
    run = tmp_path / "run"
    settings = settings_of(tmp_path, run) | {"checkpoint": {"every_steps": None}}
    config = written(tmp_path / "config.yaml", settings)
    cluster = slurm(**CPU)
    job = cluster.sbatch(config)
    wait_until(lambda: steps_on_record(run) >= 3, job)
    job.send_signal(signal.SIGUSR1)
    code, said = finish(job)
    assert (code, len(cluster.requeued)) == (0, 1), said
    last = steps_on_record(run)
    assert "saved, as it was asked to" in said
    assert code == 0 and finish(cluster.sbatch(config))[0] == 0
    starts = json.loads((run / "manifest.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, last]
    assert numbers(run) == numbers(tmp_path / "whole")


def test_a_job_that_slurm_will_not_take_back_has_failed(slurm):
    cluster = slurm(FAKE_SRUN="exit 1", REQUEUE_AFTER="0")
    (cluster.folder / "requeued").mkdir()  # nothing can be written there: scontrol fails
    code, _ = finish(cluster.sbatch("config.yaml"))
    assert code != 0


def test_the_job_starts_one_task_a_node_in_the_container_that_was_named(slurm, tmp_path):
    show = tmp_path / "in container"
    show.mkdir()
    (show / "enter").write_text(
        '#!/bin/bash\necho "$* NNODES=$NNODES HEAD=$HEAD PORT=$PORT RUN_ID=$RUN_ID $DEVICE"\n'
    )
    (show / "enter").chmod(0o755)
    cluster = slurm(nodes=3, CONTAINER_COMMAND="enter --nv image.sif", SLURM_JOB_ID="31234")
    cluster.environment["PATH"] = f"{show}:{cluster.environment['PATH']}"
    for start in (0, 1):
        code, said = finish(cluster.sbatch("my config.yaml", "run.directory=a b"))
        assert code == 0, said
        assert cluster.log(2) == (
            "--nv image.sif examples/davinci_3b/torchrun.sh my config.yaml run.directory=a b logging.progress=lines "
            f"NNODES=3 HEAD=127.0.0.1 PORT=21234 RUN_ID=31234-{start} cuda\n"
        )
    assert {"--ntasks=3", "--ntasks-per-node=1"} <= set((cluster.folder / "srun").read_text().split())


# ---- torchrun.sh -----------------------------------------------------------------------------------------


def torchrun(*arguments, **environment):
    return subprocess.run(
        [TORCHRUN, *arguments], env=outside(**environment), capture_output=True, text=True, timeout=240
    )


@pytest.fixture
def shown(tmp_path):
    """An interpreter that shows its arguments, each on a line, and the network's variables."""
    path = tmp_path / "show"
    path.write_text(
        '#!/bin/bash\nprintf "%s\\n" "$@"\nenv | grep -E "^(NCCL|GLOO)_" | sort\n', encoding="utf-8"
    )
    path.chmod(0o755)
    return str(path)


def test_one_node_needs_nothing_but_a_configuration(shown):
    done = torchrun("my config.yaml", "run.directory=a b", PYTHON=shown)
    assert done.stdout.splitlines() == [
        *(
            "-m",
            "megatron_davinci.train.agent",
            "--nnodes",
            "1",
            "--nproc-per-node",
            "gpu",
            "--max-restarts",
            "0",
        ),
        *("--standalone", "-m", "megatron_davinci.train", "my config.yaml", "run.directory=a b"),
        *("parallel.device=cuda", "NCCL_DEBUG=WARN"),
    ]


def test_many_nodes_meet_at_the_head_over_the_interface_that_was_named(shown):
    where = {"NNODES": "8", "HEAD": "node01", "PORT": "4000", "RUN_ID": "a-1", "JOIN_TIMEOUT": "9"}
    network = {"INTERFACE": "ib0", "GLOO_SOCKET_IFNAME": "eth0", "LOCAL_ADDR": "10.0.0.2"}
    done = torchrun("c.yaml", PYTHON=shown, **where, **network)
    words = done.stdout.splitlines()
    assert words[words.index("--rdzv-backend") : words.index("-m", 1)] == [
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "node01:4000", "--rdzv-id", "a-1"),
        *("--rdzv-conf", "join_timeout=9,read_timeout=9", "--local-addr", "10.0.0.2"),
    ]
    assert words[-3:] == ["GLOO_SOCKET_IFNAME=eth0", "NCCL_DEBUG=WARN", "NCCL_SOCKET_IFNAME=ib0"]


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [((), {}, "usage:"), (("c.yaml",), {"NNODES": "2"}, "NNODES is 2 and HEAD is not set")],
)
def test_what_is_missing_is_said_before_anything_starts(shown, arguments, environment, says):
    done = torchrun(*arguments, PYTHON=shown, **environment)
    assert (done.returncode, done.stdout) == (2, "") and says in done.stderr


@pytest.mark.long
def test_a_rank_that_refuses_its_configuration_gives_its_own_exit_code(tmp_path):
    config = written(tmp_path / "config.yaml", settings_of(tmp_path, tmp_path / "run"))
    done = torchrun(config, "train.micro_batch_size=0", DEVICE="cpu", RANKS_PER_NODE="2")
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1 and "train.micro_batch_size" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_node_that_cannot_reach_the_rendezvous_says_who_and_where(tmp_path):
    done = torchrun("c.yaml", **CPU, NNODES="2", HEAD="node01.invalid", PORT="4000", JOIN_TIMEOUT="1")
    assert done.returncode == 2
    # One screen, without what torch's C++ says at each attempt.
    assert done.stderr.startswith("error: This node could not reach the rendezvous.\n  where:")
    assert len(done.stderr.splitlines()) == 4
    assert f"node {socket.gethostname()}, rendezvous node01.invalid:4000" in done.stderr
    assert "node01.invalid is not a name that this node can resolve" in done.stderr


# ---- the agent -------------------------------------------------------------------------------------------


def test_a_node_that_waits_for_the_others_in_vain_says_so_within_the_timeout(capsys):
    endpoint = f"127.0.0.1:{free_port()}"
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "a-1"]
    waits = ["--rdzv-conf", "join_timeout=1,read_timeout=1"]
    code = agent.main(["--nnodes", "2", "--nproc-per-node", "1", *rendezvous, *waits, "train.py"])
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: Not every node came to the rendezvous in time.")
    assert f"node {socket.gethostname()}, rendezvous {endpoint}" in said
    assert "2 nodes with --rdzv-id a-1, within 1 s" in said


def test_a_port_that_nobody_listens_at_is_told_from_a_name_that_nobody_has():
    assert "a connection to its port" in agent._why_not(f"127.0.0.1:{free_port()}")
    assert "not a name" in agent._why_not("node01.invalid:4000")


@pytest.mark.parametrize(
    ("ranks", "settings", "gpus", "refused"),
    [
        ("8", ["parallel.device=cuda"], 4, "8, one a rank"),
        ("gpu", [], 0, "at least one"),
        ("8", ["parallel.device=cuda"], 8, None),
        ("4", ["parallel.device=cuda"], 8, None),
        ("2", ["parallel.device=cpu"], 0, None),
        ("gpu", [], 1, None),
    ],
)
def test_a_node_with_fewer_gpus_than_ranks_is_refused_before_the_others_wait(
    ranks, settings, gpus, refused, monkeypatch
):
    monkeypatch.setattr("megatron_davinci.platform.device.count_gpus", lambda: gpus)
    if refused is None:
        agent.check_gpus(ranks, ["config.yaml", *settings])
        return
    with pytest.raises(EnvironmentProblem) as error:
        agent.check_gpus(ranks, ["config.yaml", *settings])
    assert f"node {socket.gethostname()}" in str(error.value)
    assert f"{gpus} GPUs" in error.value.found and refused in error.value.expected


# ---- the files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_a_script_parses_and_stops_at_its_first_error(name):
    script = SCRIPTS / name
    subprocess.run(["bash", "-n", script], check=True)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in script.read_text()


def test_torchrun_can_be_called():
    assert os.access(TORCHRUN, os.X_OK)


def test_sbatch_reads_its_options_before_the_first_command():
    lines = (SCRIPTS / "slurm.sbatch").read_text().splitlines()
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    options = [n for n, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert options and max(options) < first
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:USR1@120"} <= {lines[n] for n in options}


def test_the_container_names_no_registry():
    lines = (SCRIPTS / "Containerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("FROM")] == ["FROM ${BASE_IMAGE}"]
    assert "ARG BASE_IMAGE" in lines
