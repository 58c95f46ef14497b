"""A checkpoint of Megatron-LM becomes one of ours: the same logits, whatever its layout, and nothing in it is run."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_davinci.cli.convert import import_checkpoint
from megatron_davinci.cli.convert_to_hf import export
from megatron_davinci.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_davinci.convert.stored import StoredTensors
from megatron_davinci.errors import CheckpointError, ConfigError
from megatron_davinci.train import checkpoint_files
from tests.convert import megatron_lm
from tests.ranks import run_ranks

BATCH = torch.randint(0, megatron_lm.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0)).tolist()
LLAMA: dict[str, Any] = {}
QWEN2 = {"add_qkv_bias": True, "untie_embeddings_and_output_weights": False}


def saved(
    folder: Path, changes: dict[str, Any], tensor: int = 1, pipeline: int = 1, virtual: int | None = None
) -> Any:
    # Megatron-Core writes in processes of its own.
    given = (folder, changes, tensor, pipeline, virtual, BATCH)
    return run_ranks(tensor * pipeline, megatron_lm.save, *given, parents=True)[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, saved(folder, LLAMA)


def imported(source: Path, out: Path) -> tuple[Path, dict[str, Any]]:
    import_checkpoint(source, out)
    return out, checkpoint_files.read(out).manifest["model"]


def weights(state: Path) -> dict[str, torch.Tensor]:
    stored = StoredTensors(state)
    return {key: stored.read(key) for key in stored.keys()}  # noqa: SIM118


def test_the_model_says_what_the_one_in_megatron_lm_said(tmp_path, llama, capsys):
    source, logits = llama
    out, model = imported(source, tmp_path / "weights")
    assert logits.std() > 0.5
    (ours,) = run_ranks(1, megatron_lm.logits_of, out, model, 1, BATCH)
    np.testing.assert_allclose(ours, logits, atol=1e-4, rtol=0)
    halves = run_ranks(2, megatron_lm.logits_of, out, model, 2, BATCH)
    np.testing.assert_allclose(np.concatenate(halves, axis=-1), logits, atol=1e-4, rtol=0)
    said = capsys.readouterr().out
    for line in (
        "the optimizer's state",
        "the iteration (70)",
        "the learning rate's place",
        "the states of random",
    ):
        assert f"not carried over: {line}" in said
    section = yaml.safe_load(said[said.index("model:") :])
    assert section["checkpoint"] == {"initial_weights": str(out)}
    assert section["model"].items() <= model.items() and section["model"]["rope_base"] == 5000
    assert model["vocab_size"] == megatron_lm.PADDED and model["norm_epsilon"] == 1e-5
    manifest = checkpoint_files.read(out).manifest
    assert manifest["weights_only"] and manifest["from"]["iteration"] == 70
    assert not list(tmp_path.glob("LATEST")) and not list(tmp_path.glob(".step-*"))


def test_and_so_does_the_one_that_transformers_loads(tmp_path, llama):
    from transformers import AutoModelForCausalLM

    source, logits = llama
    out, _ = imported(source / "iter_0000070", tmp_path / "weights")
    theirs = AutoModelForCausalLM.from_pretrained(export(str(out), tmp_path / "hf"), dtype="auto").eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        found = theirs(torch.tensor(BATCH)).logits
    np.testing.assert_allclose(found, logits, atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match="where its export belongs"):
        export(str(out))
    with pytest.raises(ConfigError, match="there already"):
        import_checkpoint(source, out)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "virtual"),
    [
        (2, 2, 2),
        pytest.param(2, 1, None, marks=pytest.mark.long),
        pytest.param(1, 4, None, marks=pytest.mark.long),
    ],
)
def test_a_checkpoint_of_any_layout_is_the_same(tmp_path, llama, tensor, pipeline, virtual):
    saved(tmp_path / "cut", LLAMA, tensor, pipeline, virtual)
    one, _ = imported(llama[0], tmp_path / "one")
    many, _ = imported(tmp_path / "cut", tmp_path / "many")
    expected, found = weights(one / "state"), weights(many / "state")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_tied_embeddings_and_biases(tmp_path):
    logits = saved(tmp_path / "qwen2", QWEN2)
    out, model = imported(tmp_path / "qwen2", tmp_path / "weights")
    assert model["tie_embeddings"] and model["qkv_bias"]
    (ours,) = run_ranks(1, megatron_lm.logits_of, out, model, 1, BATCH)
    np.testing.assert_allclose(ours, logits, atol=1e-4, rtol=0)


@pytest.fixture
def copy(tmp_path, llama) -> Path:
    """A checkpoint of Megatron-LM that a test may spoil."""
    import shutil

    return Path(shutil.copytree(llama[0] / "iter_0000070", tmp_path / "iter_0000070"))


def refused(kind: type[Exception], folder: Path) -> str:
    with pytest.raises(kind) as caught:
        import_checkpoint(folder, folder.parent / "out")
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
    return str(caught.value)


class Runs:
    """What a hostile pickle holds: a call of a function of the system's."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def hostile(value: Any) -> bytes:
    import pickle

    return pickle.dumps(value)


def test_nothing_that_a_checkpoint_names_is_run(tmp_path, copy):
    import pickle

    mark = tmp_path.parent / f"{tmp_path.name}-was-run"
    (good,) = [(copy / ".metadata").read_bytes()]
    with_runs = pickle.loads(good)
    with_runs.planner_data = Runs(mark)
    for content in (hostile(Runs(mark)), hostile(with_runs), hostile({"state_dict_metadata": Runs(mark)})):
        (copy / ".metadata").write_bytes(content)
        assert "the name posix.mkdir" in refused(CheckpointError, copy)
        assert not mark.exists()
    # Shown to be live: what torch's own reader does with such a file.
    from torch.distributed.checkpoint import FileSystemReader

    (copy / ".metadata").write_bytes(hostile(Runs(mark)))
    with pytest.raises(AttributeError):
        FileSystemReader(str(copy)).read_metadata()
    assert mark.exists()
    mark.rmdir()
    (copy / ".metadata").write_bytes(good)
    # In common.pt names are allowed, because arguments hold objects of all kinds, and none is followed.
    common(copy, lambda content: content | {"rerun_state_machine": Runs(mark)})
    assert MegatronCheckpoint.of(copy).model["num_layers"] == 4
    assert not mark.exists()


def common(folder: Path, change: Any) -> None:
    content = torch.load(folder / "common.pt", weights_only=False)
    torch.save(change(content), folder / "common.pt")


def test_our_own_checkpoints_are_read_no_other_way(tmp_path, llama):
    mark = tmp_path / "was-run"
    out, model = imported(llama[0], tmp_path / "weights")
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "state" / ".metadata").write_bytes(hostile(Runs(mark)))
    entry = manifest["files"]["state/.metadata"]
    entry["bytes"] = (out / "state" / ".metadata").stat().st_size
    entry["sha256"] = checkpoint_files.file_digest(out / "state" / ".metadata")
    (out / "manifest.json").write_text(checkpoint_files.text_of(checkpoint_files.sealed(manifest)))
    checkpoint_files.read(out)
    with pytest.raises(CheckpointError, match=r"posix\.mkdir"):
        run_ranks(1, megatron_lm.logits_of, out, model, 1, BATCH)
    with pytest.raises(CheckpointError, match=r"posix\.mkdir"):
        export(str(out), tmp_path / "hf")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"normalization": "LayerNorm", "swiglu": False}, ["normalization = 'LayerNorm'", "swiglu = False"]),
        ({"num_experts": 8}, ["num_experts = 8"]),
        (
            {"rotary_seq_len_interpolation_factor": 4, "no_rope_freq": [0, 1], "softmax_scale": 0.5,
             "glu_linear_offset": 1.0, "activation_func_clamp_value": 7.0},
            ["interpolation_factor = 4", "no_rope_freq", "softmax_scale", "glu_linear_offset", "clamp_value"],
        ),
        ({"position_embedding_type": "yarn", "use_rope_scaling": True}, ["'yarn'", "use_rope_scaling"]),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_built_here_is_refused_with_all_reasons(copy, changes, said):
    common(copy, lambda content: content | {"args": megatron_lm.arguments(**changes)})
    text = refused(ConfigError, copy)
    assert all(one in text for one in said)


def test_arguments_that_speak_of_another_model(copy):
    common(copy, lambda content: content | {"args": megatron_lm.arguments(num_layers=3, add_qkv_bias=True)})
    text = refused(CheckpointError, copy)
    assert "missing: decoder.layers.self_attention.linear_qkv.bias" in text
    assert "decoder.layers.mlp.linear_fc2.weight: shape [4, 32, 48], not [3, 32, 48]" in text
    common(copy, lambda content: content | {"args": megatron_lm.arguments(hidden_size="wide")})
    assert "hidden_size" in refused(CheckpointError, copy)
    common(copy, lambda content: {"iteration": 3})
    assert "does not say what model" in refused(CheckpointError, copy)


def test_what_is_no_checkpoint_of_that_format_is_named(tmp_path, copy):
    with zipfile.ZipFile(copy / "common.pt", "w") as archive:
        archive.writestr("common/data.pkl", b"\x80\x04no pickle")
    assert "common.pt cannot be read" in refused(CheckpointError, copy)
    (copy / "metadata.json").write_text('{"sharded_backend": "fsdp_dtensor"}')
    assert "fsdp_dtensor" in refused(CheckpointError, copy)
    (copy / "metadata.json").unlink()
    (copy / "mp_rank_00").mkdir()
    assert "the older format torch" in refused(CheckpointError, copy)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("soon")
    with pytest.raises(CheckpointError, match="newest checkpoint cannot be read"):
        MegatronCheckpoint.of(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        MegatronCheckpoint.of(tmp_path / "nowhere")
