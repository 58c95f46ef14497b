"""A save in the background leaves what a save in the foreground leaves, and disturbs nothing."""

import json
import threading

import pytest

from megatron_davinci.errors import DavinciError
from megatron_davinci.platform.checkpoint_metadata import read_metadata
from megatron_davinci.train import checkpoint_files
from tests.distributed.test_resume import numbers
from tests.ranks import RankFailed, run_ranks
from tests.tiny import tiny_settings, train_here


def lines(run):
    return [json.loads(line) for line in (run / "saves.jsonl").read_text().splitlines()]


def files_of(run, step):
    """Digests of a checkpoint's files; of `.metadata`, which has a random name of the save in it, the content."""
    found = checkpoint_files.read(checkpoint_files.step_folder(run / "checkpoints", step))
    described = read_metadata(found.state / ".metadata")
    stored = {(i.fqn, i.offset): vars(where) for i, where in described.storage_data.items()}
    digests = {name: entry["sha256"] for name, entry in found.manifest["files"].items()}
    assert digests.pop("state/.metadata")
    return digests, stored, described.state_dict_metadata


def train_with_a_slow_disk(settings):
    """Train; the disk takes the shards only when training is three steps further, or is over."""
    from megatron_davinci.train.loop import TrainingRun
    from megatron_davinci.train.saver import Saver
    from megatron_davinci.train.snapshot import Snapshot

    write, step = Snapshot.write, TrainingRun._step
    settle, moved, waiting, steps = Saver._settle, threading.Condition(), [False], [0]

    def slow(self, files):
        with moved:
            begin = steps[0]
            assert self.copied
            assert moved.wait_for(lambda: steps[0] >= begin + 3 or waiting[0], timeout=60)
        return write(self, files)

    def counted(self, *args):
        with moved:
            steps[0] += 1
            moved.notify_all()
        return step(self, *args)

    def awaited(self):
        with moved:
            waiting[0] = True
            moved.notify_all()
        settle(self)
        waiting[0] = False

    Snapshot.write, TrainingRun._step, Saver._settle = slow, counted, awaited
    return train_here(settings)


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {"distributed_optimizer": True}),
        pytest.param(1, {}, marks=pytest.mark.long),
        pytest.param(2, {"tensor": 2}, marks=pytest.mark.long),
    ],
    ids=["DP2, sharded optimizer", "one rank", "TP2"],
)
def test_in_the_background_the_same_files_are_written(tmp_path, ranks, parallel):
    runs = {}
    for name, train, background in (
        ("background", train_with_a_slow_disk, True),
        ("foreground", train_here, False),
    ):
        settings = tiny_settings(
            tmp_path,
            run={"directory": str(tmp_path / name)},
            parallel=parallel,
            train={"stop_after_steps": 12},
            checkpoint={"every_steps": 5, "keep": 9, "async_save": background},
        )
        run_ranks(ranks, train, settings)
        runs[name] = tmp_path / name
    assert numbers(runs["background"]) == numbers(runs["foreground"])
    for step in (5, 10, 12):
        assert files_of(runs["background"], step) == files_of(runs["foreground"], step)
    assert [(line["step"], line["saved"]) for line in lines(runs["background"])] == [
        (n, True) for n in (5, 10, 12)
    ]
    assert all(line["waited_seconds"] == line["seconds"] for line in lines(runs["foreground"]))
    assert all(line["waited_seconds"] < line["seconds"] for line in lines(runs["background"]))


def train_without_memory(settings):
    from megatron_davinci.platform import host_copy

    host_copy.available_bytes = lambda: 10_000
    return train_here(settings)


def test_a_host_without_memory_for_a_copy_saves_in_the_foreground(tmp_path):
    settings = tiny_settings(tmp_path, train={"stop_after_steps": 4}, checkpoint={"every_steps": 2})
    run_ranks(1, train_without_memory, settings)
    assert [line["waited_seconds"] == line["seconds"] for line in lines(tmp_path / "run")] == [True, True]


def train_with_a_mistake(settings):
    from megatron_davinci.train.snapshot import Snapshot

    def wrong(self, files):
        raise TypeError("a mistake of ours")

    Snapshot.write = wrong
    return train_here(settings)


def test_a_mistake_of_ours_is_not_taken_for_the_disks(tmp_path):
    with pytest.raises(RankFailed, match="a mistake of ours"):
        run_ranks(1, train_with_a_mistake, tiny_settings(tmp_path, checkpoint={"every_steps": 5}))


def train_and_fail(settings, at):
    """Train; the run ends with an error in the step after a save was begun."""
    from megatron_davinci.train.loop import TrainingRun

    step = TrainingRun._step

    def failing(self, plan, *args):
        if plan.step == at:
            raise DavinciError("The run ends here.")
        return step(self, plan, *args)

    TrainingRun._step = failing
    return train_here(settings)


def test_a_run_that_ends_by_an_error_still_finishes_the_save_at_work(tmp_path):
    settings = tiny_settings(tmp_path, checkpoint={"every_steps": 5})
    with pytest.raises(DavinciError, match="ends here"):
        run_ranks(2, train_and_fail, settings, 6)
    assert checkpoint_files.newest_good(tmp_path / "run" / "checkpoints")[0].step == 5


def both_gathered(root, parallel, model):
    """Megatron-Core's gathered state and ours, twice, with a step between; whether they are the same to the bit."""
    import torch

    from megatron_davinci.optim.build import set_hyperparameters
    from megatron_davinci.platform.gathered_state import GatheredState
    from tests.faults.trials import State

    state, ours, same = State(root, model=model, **parallel), GatheredState(), []
    several = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    for number in range(2):
        for one in several:
            expected = one.get_parameter_state_dp_zero()
            with ours.used_by(state.optimizer):
                found = one.get_parameter_state_dp_zero()
            if expected is None:
                same.append(found is None)
                continue
            for place in range(len(one.gbuf_ranges)):
                for dtype, tensors in expected[place].items():
                    same += [
                        torch.equal(tensors[k], found[place][dtype][k])
                        for k in ("param", "exp_avg", "exp_avg_sq")
                    ]
                    same.append(tensors["numel_unpadded"] == found[place][dtype]["numel_unpadded"])
                    kept, part = ours.storages(), found[place][dtype]["param"][3:5]
                    same.append(part.untyped_storage().data_ptr() in kept)
                    same.append(tensors["param"].untyped_storage().data_ptr() not in kept)
        for chunk in state.chunks:
            for parameter in chunk.parameters():
                parameter.main_grad.copy_(torch.randn_like(parameter) + number)
        set_hyperparameters(state.optimizer, learning_rate=1e-2, weight_decay=0.1)
        state.optimizer.step()
    return same


@pytest.mark.parametrize(
    ("ranks", "parallel", "model"),
    [
        pytest.param(1, {}, {}, id="one rank"),
        pytest.param(2, {}, {}, id="DP2"),
        pytest.param(
            4,
            {"expert": 2},
            {"ffn_hidden_size": 32, "experts": {"number": 4}},
            id="DP4, EP2",
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_state_is_gathered_as_megatron_core_gathers_it(ranks, parallel, model, tmp_path):
    tiny_settings(tmp_path)  # its sources, before several ranks find none
    answers = run_ranks(ranks, both_gathered, tmp_path, parallel, model)
    assert all(answers[0]) and len(answers[0]) >= 10 and all(all(one) for one in answers)
