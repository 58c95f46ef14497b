"""Every layout computes the run of one rank: loss and gradient norm at each of thirty steps (6 without --long)."""

import itertools
import json

import pytest

from tests.cases import is_long
from tests.ranks import run_ranks
from tests.tiny import tiny_settings, train_each, train_here

STEPS = 30 if is_long() else 6
TOLERANCE = 1e-4
EXPERTS = {"number": 4, "top_k": 2, "balance_coefficient": 0.05, "router_z_loss": 0.01}
SEQUENCE = {"tensor": 2, "sequence": True}
UNEVEN = {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": [0, 2, 1, 1]}
# By number of ranks, since those of one number are trained on the same ranks, one after the other.
DENSE = {
    2: {
        "TP2+SP": SEQUENCE,
        "PP2xVP2": {"pipeline": 2, "virtual_pipeline": 2},
    },
}
SPARSE = {2: {"EP2xTP2+SP": {"expert": 2, **SEQUENCE}}}
LONG = {
    "DP2": (2, {}, None),
    "CP2": (2, {"context": 2}, None),
    "DP2, overlapped reduction": (2, {"overlap_gradient_reduce": True}, None),
    "PP2xVP2xDP2, uneven, overlapped reduction": (4, {**UNEVEN, "overlap_gradient_reduce": True}, None),
    "DP2, optimizer not sharded": (2, {"distributed_optimizer": False}, None),
    "TP2": (2, {"tensor": 2}, None),
    "PP2, uneven": (2, {"pipeline": 2, "pipeline_layers": [3, 1]}, None),
    "TP4, more than key/value heads": (4, {"tensor": 4}, None),
    "CP2xTP2+SP": (4, {"context": 2, **SEQUENCE}, None),
    "DP4": (4, {}, None),
    "CP4": (4, {"context": 4}, None),
    "PP3, uneven": (3, {"pipeline": 3, "pipeline_layers": [1, 2, 1]}, None),
    "PP4": (4, {"pipeline": 4}, None),
    "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}, None),
    "TP2+SPxPP2xCP2": (8, {**SEQUENCE, "pipeline": 2, "context": 2}, None),
    "EP2": (2, {"expert": 2}, EXPERTS),
    "EP2xPP2xVP2, all-gather": (
        4,
        {"expert": 2, "pipeline": 2, "virtual_pipeline": 2, "expert_dispatcher": "allgather"},
        EXPERTS,
    ),
    "TP2+SPxPP2xVP2xDP2": (8, {**SEQUENCE, "pipeline": 2, "virtual_pipeline": 2}, None),
    "TP2+SPxCP2xDP2": (8, {**SEQUENCE, "context": 2}, None),
    "EP2xCP2": (2, {"expert": 2, "context": 2}, EXPERTS),
    "EP2xETP2xTP2+SP": (4, {"expert": 2, "expert_tensor": 2, **SEQUENCE}, EXPERTS),
    "EP4xDP4": (4, {"expert": 4}, EXPERTS),
    "EP2, optimizer not sharded": (2, {"expert": 2, "distributed_optimizer": False}, EXPERTS),
    "EP2xPP2xVP2xTP2+SP": (8, {"expert": 2, **SEQUENCE, "pipeline": 2, "virtual_pipeline": 2}, EXPERTS),
    "EP4xTP2+SPxPP2xCP2": (8, {"expert": 4, **SEQUENCE, "pipeline": 2, "context": 2}, EXPERTS),
}


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluations(run):
    return [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]


def settings_of(root, run, parallel, experts=None):
    """Four layers and micro-batches of one sequence: enough of both for every layout."""
    settings = tiny_settings(
        root, parallel={"device": "cpu", **parallel}, run={"directory": str(run), "seed": 7}
    )
    settings["model"] |= {"num_layers": 4, "ffn_hidden_size": 32 if experts else 64, "experts": experts}
    settings["train"] |= {"micro_batch_size": 1, "stop_after_steps": STEPS}
    settings["evaluation"] = {"sequences": 16, "every_steps": 5}
    return settings


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def one_rank(root):
    """The runs to compare with, and their held-out losses."""
    runs = {"dense": root / "dense", "sparse": root / "sparse"}
    whole = [settings_of(root, runs["dense"], {}), settings_of(root, runs["sparse"], {}, EXPERTS)]
    run_ranks(1, train_each, whole)
    return {name: (metrics(run), evaluations(run)) for name, run in runs.items()}


@pytest.fixture(scope="module")
def trained(root):
    """Trains all layouts of a number of ranks when the first of them is asked for."""
    done = set()

    def run_of(kind, world, name):
        if world not in done:
            done.add(world)
            whole = [
                settings_of(root, root / f"dense-{world}-{number}", parallel)
                for number, parallel in enumerate(DENSE.get(world, {}).values())
            ]
            whole += [
                settings_of(root, root / f"sparse-{world}-{number}", parallel, EXPERTS)
                for number, parallel in enumerate(SPARSE.get(world, {}).values())
            ]
            run_ranks(world, train_each, whole, timeout=600)
        table = DENSE if kind == "dense" else SPARSE
        return root / f"{kind}-{world}-{list(table[world]).index(name)}"

    return run_of


def deviation(found, expected, what):
    return max(abs(x[what] - y[what]) / y[what] for x, y in zip(found, expected, strict=True))


def assert_same(run, expected, heldout, record_property):
    found = metrics(run)
    assert len(found) == STEPS
    for what in ("loss", "grad_norm"):
        record_property(what, deviation(found, expected, what))
        assert deviation(found, expected, what) <= TOLERANCE, what
    for ours, theirs in zip(evaluations(run), heldout, strict=True):
        assert ours["heldout_tokens"] == theirs["heldout_tokens"]
        assert ours["heldout_loss"]["a"] == pytest.approx(theirs["heldout_loss"]["a"], rel=TOLERANCE)


TABLE = [
    pytest.param(kind, world, name, id=name)
    for kind, table in (("dense", DENSE), ("sparse", SPARSE))
    for world, layouts in table.items()
    for name in layouts
]


@pytest.mark.parametrize(("kind", "world", "name"), TABLE)
def test_steps_equal_those_of_one_rank(kind, world, name, one_rank, trained, record_property):
    assert_same(trained(kind, world, name), *one_rank[kind], record_property)


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_more_layouts_equal_one_rank(name, root, one_rank, tmp_path, record_property):
    ranks, parallel, experts = LONG[name]
    run_ranks(ranks, train_here, settings_of(root, tmp_path / "run", parallel, experts), timeout=600)
    assert_same(tmp_path / "run", *one_rank["sparse" if experts else "dense"], record_property)


def test_the_comparison_can_fail(root, one_rank, tmp_path):
    # Another seed is another run: the tolerance above is no blank cheque.
    settings = settings_of(root, tmp_path / "run", {})
    settings["run"]["seed"] = 8
    run_ranks(1, train_here, settings)
    assert deviation(metrics(tmp_path / "run"), one_rank["dense"][0], "loss") > 1e-2


@pytest.fixture(scope="module")
def fifty_steps(root):
    run_ranks(1, train_here, tiny_settings(root, run={"directory": str(root / "fifty"), "seed": 7}))
    return metrics(root / "fifty")


def test_a_model_learns_and_its_stages_change_batch_and_rate(fifty_steps):
    steps = fifty_steps
    assert steps[0]["loss"] == pytest.approx(5.55, abs=0.1)  # ln(256)
    assert steps[-1]["loss"] < 3.0
    assert [s["global_batch_size"] for s in steps] == [4] * 12 + [8] * 38
    assert [s["stage"] for s in steps] == ["first"] * 30 + ["second"] * 20
    assert [s["step"] for s in steps] == list(range(1, 51))
    rates = [s["learning_rate"] for s in steps]
    assert rates[:5] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2])
    assert rates[29] == 1e-2 and rates[30] == 5e-3
    assert rates[49] == pytest.approx(1e-4)
    assert all(a > b for a, b in itertools.pairwise(rates[30:]))


@pytest.mark.long
def test_bf16_follows_fp32_and_keeps_fp32_main_weights(root, fifty_steps, tmp_path):
    settings = tiny_settings(
        root,
        run={"directory": str(tmp_path / "run"), "seed": 7},
        train={"micro_batch_size": 2, "precision": "bf16", "stop_after_steps": 12},
    )
    run_ranks(2, train_here, settings)
    assert 1e-6 < deviation(metrics(tmp_path / "run"), fifty_steps[:12], "loss") < 0.1
