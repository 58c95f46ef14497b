"""A run that goes on from the memory of its nodes is the run that would have been, with nodes lost or not."""

import json
import os
import signal
from contextlib import contextmanager

import psutil
import pytest

from megatron_davinci.config import validate
from megatron_davinci.data import Journal, SkipRecord
from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.platform.snapshot_memory import Keeper, RankMemory, boot_id, keeper_address
from megatron_davinci.train.snapshots_here import HeldHere, held_here
from tests.cli.screen import davinci
from tests.distributed.test_resume import numbers
from tests.ranks import run_ranks, start_ranks
from tests.tiny import LENGTH, tiny_settings, train_here

STEPS, DIES_IN, EVERY = 14, 9, 3
EXPERTS = {"ffn_hidden_size": 32, "experts": {"number": 4, "router_z_loss": 0.01}}


def settings_of(root, name, *, parallel=None, snapshots=None, every=None, **changes):
    """A run of `STEPS` steps. One that is to die has snapshots, and checkpoints every so many steps."""
    settings = tiny_settings(
        root,
        run={"directory": str(root / name), "seed": 7},
        parallel=parallel or {},
        # On the disk by the time that the run is killed.
        checkpoint={"every_steps": every, "async_save": False},
        **changes,
    )
    settings["train"]["stop_after_steps"] = STEPS
    if snapshots is not None:
        settings["snapshots"] = {"every_steps": EVERY, "keep_alive_seconds": 60, **snapshots}
    return settings


def batch_for(root):
    """A batch that three and four ranks can share."""
    stage = tiny_settings(root)["curriculum"][1]
    return {"curriculum": [{**stage, "tokens": (STEPS + 1) * 24 * LENGTH, "global_batch_size": 24}]}


def die_in_step(settings, step):
    """Train, and be killed where a step has been computed and is not on record yet."""
    from megatron_davinci.train.loop import TrainingRun

    take = TrainingRun._step

    def mortal(self, plan, *rest):
        result = take(self, plan, *rest)
        if plan.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    TrainingRun._step = mortal
    return train_here(settings)


def killed(world, settings, step=DIES_IN):
    """Have all ranks of a run killed in a step."""
    started = start_ranks(world, die_in_step, settings, step)
    for process, connection in started:
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, connection.recv() if connection.poll(1) else "no end"
        connection.close()


def address(run, node=None):
    """Where the keeper of a run on a node of this machine listens."""
    created = json.loads((run / "manifest.json").read_text())["created"]
    name = boot_id() if node is None else f"{boot_id()}/{node}"
    return keeper_address(f"{os.path.realpath(run)}\0{created}", name)


def keepers(run, nodes):
    """The processes that keep a run's snapshots, by node."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        for node in nodes:
            if address(run, node) in (process.info["cmdline"] or []):
                found[node] = process
    return found


def lose(run, *nodes):
    """Have nodes lose what they held, as when they are switched off."""
    for process in keepers(run, nodes).values():
        process.kill()
        process.wait(10)


def began_with(run):
    """The steps that the starts of a run began after."""
    return [start["step"] for start in json.loads((run / "manifest.json").read_text())["starts"]]


def state(run):
    """Digests of the state that a run ended with."""
    manifest = json.loads((run / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".distcp")}


def check_killed_and_resumed(root, world, *, lost=(), steps=(0, 6), **changes):
    """Kill a run, have nodes lose their memory, and hold what it becomes against the same run undisturbed."""
    snapshots = changes.pop("snapshots", {})
    if not (root / "whole").exists():
        run_ranks(world, train_here, settings_of(root, "whole", **changes))
    settings = settings_of(root, "killed", snapshots=snapshots, **changes)
    killed(world, settings)
    lose(root / "killed", *lost)
    run_ranks(world, train_here, settings)
    assert began_with(root / "killed") == list(steps)
    assert numbers(root / "killed") == numbers(root / "whole")
    assert state(root / "killed") == state(root / "whole")
    assert len(state(root / "whole")) >= 1
    for keeper in keepers(root / "killed", [None, *range(world)]).values():
        keeper.wait(30)  # it was told to end, and does that by itself


@pytest.mark.parametrize(
    ("parallel", "changes"),
    [
        pytest.param({}, {}, id="DP2", marks=pytest.mark.long),
        pytest.param({"tensor": 2, "sequence": True}, {}, id="TP2", marks=pytest.mark.long),
        pytest.param({"pipeline": 2, "distributed_optimizer": False}, {}, id="PP2, unsharded"),
        pytest.param({"pipeline": 2}, {}, id="PP2", marks=pytest.mark.long),
        pytest.param({"distributed_optimizer": False}, {}, id="DP2, unsharded", marks=pytest.mark.long),
        pytest.param(
            {"tensor": 2, "distributed_optimizer": False}, {}, id="TP2, unsharded", marks=pytest.mark.long
        ),
        pytest.param(
            {"overlap_gradient_reduce": True, "overlap_parameter_gather": True},
            {"train": {"precision": "bf16"}},
            id="DP2, bf16, overlapped",
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"distributed_optimizer": False},
            {"train": {"precision": "bf16"}},
            id="DP2, bf16, unsharded",
            marks=pytest.mark.long,
        ),
        pytest.param({"expert": 2}, {"model": EXPERTS}, id="EP2", marks=pytest.mark.long),
        pytest.param({}, {"model": {"dropout": 0.1}}, id="DP2, dropout", marks=pytest.mark.long),
    ],
)
def test_killed_and_resumed_from_memory_is_the_same_run(parallel, changes, tmp_path):
    check_killed_and_resumed(tmp_path, 2, parallel=parallel, **changes)


@pytest.mark.parametrize(
    ("world", "parallel", "nodes", "lost"),
    [
        pytest.param(3, {}, {"ranks_per_node": 1}, [0], id="3 nodes", marks=pytest.mark.long),
        pytest.param(4, {}, {"ranks_per_node": 1}, [2], id="4 nodes", marks=pytest.mark.long),
        pytest.param(
            4, {"tensor": 2}, {"ranks_per_node": 2}, [1], id="TP2 on 2 nodes", marks=pytest.mark.long
        ),
        pytest.param(
            4,
            {"pipeline": 2},
            {"ranks_per_node": 1, "parity_nodes": 2},
            [0, 3],
            id="one of each of two groups",
            marks=pytest.mark.long,
        ),
        pytest.param(
            3,
            {"pipeline": 3, "pipeline_layers": [0, 1, 1], "distributed_optimizer": False},
            {"ranks_per_node": 1},
            [1],
            id="stages of several sizes",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_lost_node_is_computed_again_from_parity(world, parallel, nodes, lost, tmp_path):
    batch = batch_for(tmp_path)
    check_killed_and_resumed(tmp_path, world, parallel=parallel, snapshots=nodes, lost=lost, **batch)


@pytest.mark.long
def test_two_lost_nodes_leave_the_checkpoint_on_disk(tmp_path):
    batch = batch_for(tmp_path)
    check_killed_and_resumed(
        tmp_path, 3, snapshots={"ranks_per_node": 1}, lost=[0, 2], steps=[0, 5], every=5, **batch
    )


# ---- what a start chooses -----------------------------------------------------------------------------------


def look(settings):
    """Begin as a run does, up to its first step: the step that it goes on from, and what it says."""
    from megatron_davinci.cli.train import make_evaluator
    from megatron_davinci.platform import distributed
    from megatron_davinci.platform.device import choose
    from megatron_davinci.train.loop import TrainingRun

    config = validate(settings, where="tests")
    platform = choose("cpu", threads=1)
    distributed.start(platform, **config.parallel.groups, timeout_seconds=60, seed=7)
    run = TrainingRun(config, platform, make_evaluator(config))
    distributed.stop()
    return run.step, run.snapshots.told()


@pytest.fixture(scope="module")
def dead(tmp_path_factory):
    """A run of two nodes, a rank each, that was killed: snapshots of steps 9 and 6, checkpoints of steps 8 and 4."""
    root = tmp_path_factory.mktemp("dead")
    settings = settings_of(root, "run", snapshots={"ranks_per_node": 1, "keep_alive_seconds": 600}, every=4)
    killed(2, settings, step=11)
    yield settings, root / "run"
    lose(root / "run", 0, 1)


def begun(settings):
    steps, said = zip(*run_ranks(2, look, settings), strict=True)
    assert len(set(steps)) == 1
    return steps[0], said[0]


@contextmanager
def flipped(run, *ranks, part="data", step=9):
    """One bit of these ranks' snapshot is another one, and then as it was."""
    regions = []
    for rank in ranks:
        keeper = Keeper(address(run, rank), 600.0, start=False)
        memory = RankMemory(keeper.get(f"rank-{rank}"))
        slot = next(slot for slot in (0, 1) if memory.read(slot, "data")["step"] == step)
        regions.append(memory.region(slot, part))
        keeper.close()
    for region in regions:
        region[len(region) // 2] ^= 4
    try:
        yield
    finally:
        for region in regions:
            region[len(region) // 2] ^= 4


def test_the_newest_snapshot_is_taken(dead):
    settings, _ = dead
    assert begun(settings) == (9, ["Taken from the nodes' memory: the snapshot of step 9."])


def test_a_damaged_snapshot_is_computed_from_parity_and_two_are_passed_over(dead):
    settings, run = dead
    with flipped(run, 1):
        assert begun(settings) == (
            9,
            ["Taken from the nodes' memory: the snapshot of step 9; rank 1 from parity."],
        )
    # What is left is older than a checkpoint.
    with flipped(run, 0, 1):
        step, (said,) = begun(settings)
    assert step == 8
    assert said == (
        "The snapshot in memory of step 9 was passed over: the digest does not match of rank 0, 1, and parity makes "
        "up for one lost node of a group."
    )


def test_the_doctor_says_what_is_in_memory(dead):
    settings, run = dead
    config = validate(settings, where="tests")
    assert held_here(run, config.snapshots) == [HeldHere(9, [0, 1]), HeldHere(6, [0, 1])]
    said = davinci("doctor", run)
    assert "step 8: step-00000008" in said.out
    assert "step 9: ranks 0-1 on this machine" in said.out
    assert "it goes on after step 9, from memory" in " ".join(said.out.split())
    assert held_here(run.parent, config.snapshots) == []


@pytest.mark.long
def test_damaged_parity_is_not_used(dead):
    settings, run = dead
    with flipped(run, 1), flipped(run, 0, part="parity"):
        assert begun(settings)[0] == 8
    with flipped(run, 0, part="parity"):
        assert begun(settings)[0] == 9


def test_another_layout_goes_on_from_disk(dead):
    settings, _ = dead
    step, (said,) = begun({**settings, "parallel": {**settings["parallel"], "tensor": 2}})
    assert step == 8
    assert "another layout, model, precision, moments or version (TP1 x PP1 x DP2 = 2 ranks)" in said


def test_other_moments_go_on_from_disk(dead):
    settings, _ = dead
    step, (said,) = begun({**settings, "optimizer": {"moments": "fp8"}})
    assert step == 8
    assert "another layout, model, precision, moments or version" in said


@pytest.mark.long
def test_a_run_that_was_begun_anew_in_the_same_place_is_another_run(dead):
    settings, run = dead
    path = run / "manifest.json"
    before = path.read_text()
    path.write_text(before.replace('"created": "20', '"created": "19'))
    try:
        assert begun(settings) == (8, [])
    finally:
        path.write_text(before)


def test_samples_that_the_journal_has_skipped_since_are_not_in_what_a_run_goes_on_from(dead):
    settings, run = dead
    path = run / "journal.jsonl"
    before = path.read_text()
    Journal.open(path).append(SkipRecord(32, 36, "a spike"))  # step 9
    try:
        step, said = begun(settings)
        assert step == 8
        assert "trained on samples from 32 on, which the journal has left out since (a spike)" in said[0]
    finally:
        path.write_text(before)


def test_parity_that_must_be_there_needs_two_nodes(tmp_path):
    settings = settings_of(tmp_path, "run", snapshots={"parity": "always"})
    with pytest.raises(EnvironmentProblem, match="a partner on another node") as refused:
        run_ranks(2, train_here, settings)
    assert "2 ranks on 1 node" in str(refused.value)
    assert not keepers(tmp_path / "run", [None])


def train_with_little_memory(settings):
    """Train on a node that has 100 kB left."""
    from megatron_davinci.train import snapshot_place

    snapshot_place.available_bytes = lambda: 100_000
    return train_here(settings)


def test_a_node_without_the_memory_is_said_before_the_first_step(tmp_path):
    settings = settings_of(tmp_path, "run", snapshots={})
    with pytest.raises(EnvironmentProblem, match="not enough host memory for snapshots") as refused:
        run_ranks(2, train_with_little_memory, settings)
    assert "0.0001 GB available" in str(refused.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    lose(tmp_path / "run", None)


def lose_the_keeper_and_die(settings, run):
    """Train; the keeper of this node is killed in step 5, and the ranks in step 11."""
    from megatron_davinci.train.loop import TrainingRun

    take = TrainingRun._step

    def watched(self, plan, *rest):
        if plan.step == 5:
            lose(run, int(os.environ["LOCAL_RANK"]))
        return take(self, plan, *rest)

    TrainingRun._step = watched
    return die_in_step(settings, 11)


@pytest.mark.long
def test_a_keeper_that_was_killed_is_replaced(tmp_path):
    settings = settings_of(tmp_path, "run", snapshots={"ranks_per_node": 1})
    started = start_ranks(2, lose_the_keeper_and_die, settings, tmp_path / "run", parents=True)
    for process, connection in started:
        process.join(120)
        connection.close()
    assert begun(settings)[0] == 9
    lose(tmp_path / "run", 0, 1)
