"""A checkpoint of any layout becomes one Hugging Face folder, which plain transformers runs as we do."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_davinci.convert import export, resumable
from megatron_davinci.convert.export import export_to_hf
from megatron_davinci.convert.stored import StoredTensors
from megatron_davinci.errors import CheckpointError, ConfigError, EnvironmentProblem
from megatron_davinci.train import checkpoint_files
from tests.convert import ranks
from tests.ranks import run_ranks

TIED = {"tie_embeddings": True}
UNTIED = {"tie_embeddings": False, "head_dim": 6, "rope_base": 500.0}
BATCH = torch.randint(
    0, ranks.SIZES["vocab_size"], (3, 24), generator=torch.Generator().manual_seed(0)
).tolist()


def saved(
    folder: Path, changes: dict[str, Any], tensor: int = 1, pipeline: int = 1, virtual: int = 1
) -> Path:
    run_ranks(tensor * pipeline, ranks.save, folder, changes, tensor, pipeline, virtual)
    return checkpoint_files.step_folder(folder, 0)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("tied"), TIED)


def exported(checkpoint: Path, out: Path, *, verify: bool = True, **options: Any) -> Path:
    found = checkpoint_files.read(checkpoint, verify=verify)
    return export_to_hf(found.state, found.manifest["model"], out, **options)


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval()


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("untied"), UNTIED)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_transformers_runs_it_as_we_do(tmp_path, name, request):
    changes = {"tied": TIED, "untied": UNTIED}[name]
    theirs = load(exported(request.getfixturevalue(name), tmp_path / "out"))
    logits_here, continuation = run_ranks(1, ranks.logits_and_greedy, changes, BATCH, 64)[0]
    prompt = torch.tensor(BATCH[:1])
    with torch.no_grad():
        logits = theirs(torch.tensor(BATCH)).logits
        generated = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False, pad_token_id=0
        )
    assert logits.dtype == torch.float32 and logits.std() > 0.5, (
        "logits that differ, so that a wrong one shows"
    )
    assert (logits - torch.from_numpy(logits_here)).abs().max() <= 1e-4
    assert generated[0, prompt.shape[1] :].tolist() == continuation
    assert len(continuation) == 64 and len(set(continuation)) > 5, "a continuation that says something"
    assert theirs.config.tie_word_embeddings == changes["tie_embeddings"]


def test_a_weight_that_was_cut_wrongly_would_show(tmp_path, tied):
    theirs = load(exported(tied, tmp_path / "out"))
    before = theirs(torch.tensor(BATCH)).logits
    key = theirs.model.layers[2].self_attn.k_proj.weight
    with torch.no_grad():
        key.copy_(key.roll(1, 0))
    assert (theirs(torch.tensor(BATCH)).logits - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    "layout", [(2, 1, 1), (1, 2, 2), (2, 2, 1)], ids=lambda layout: "TP{}xPP{}xVP{}".format(*layout)
)
def test_exports_are_the_same_to_the_byte_from_every_layout(tmp_path, tied, layout):
    one = content(exported(tied, tmp_path / "one"))
    other = content(exported(saved(tmp_path / "saved", TIED, *layout), tmp_path / "other"))
    assert other == one


def test_untied_from_two_pipeline_stages(tmp_path, untied):
    one = content(exported(untied, tmp_path / "one"))
    two = content(exported(saved(tmp_path / "b", UNTIED, 1, 2), tmp_path / "two"))
    assert two == one


def test_shards_are_of_bounded_size_and_load_alike(tmp_path, tied, monkeypatch):
    whole = load(exported(tied, tmp_path / "whole")).state_dict()
    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    out = exported(tied, tmp_path / "sharded")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(path.stat().st_size < 24_000 for path in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in files}
    parts = load(out).state_dict()
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_the_dtype_can_be_chosen(tmp_path, tied):
    whole = load(exported(tied, tmp_path / "fp32")).state_dict()
    out = exported(tied, tmp_path / "bf16", dtype="bfloat16")
    half = load(out)
    assert half.dtype == torch.bfloat16
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert all(torch.equal(tensor, whole[name].bfloat16()) for name, tensor in half.state_dict().items())


def test_the_tokenizer_goes_along(tmp_path, tied):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "private notes.txt").write_text("not for publication")
    out = exported(tied, tmp_path / "out", tokenizer=tokenizer, eod_id=3)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 3


def refused(kind: type[Exception], checkpoint: Path, out: Path, **changes: Any) -> str:
    found = checkpoint_files.read(checkpoint)
    with pytest.raises(kind) as caught:
        export_to_hf(found.state, {**found.manifest["model"], **changes}, out)
    assert list(out.parent.glob(f".{out.name}*")) == [], "nothing half-written"
    return str(caught.value)


def test_what_is_there_is_not_overwritten(tmp_path, tied):
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").write_text("mine")
    assert "is there already" in refused(ConfigError, tied, out)
    assert (out / "kept").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_embeddings": False}, "missing: output_layer.weight"),
        (
            {"num_layers": 3},
            "decoder.layers.self_attention.linear_qkv.layer_norm_weight: shape [4, 32], not [3, 32]",
        ),
        ({"family": "llama", "qkv_bias": False}, "unexpected: decoder.layers.self_attention.linear_qkv.bias"),
    ],
)
def test_a_checkpoint_of_another_model(tmp_path, tied, changes, message):
    assert message in refused(CheckpointError, tied, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_sizes_that_are_not_the_checkpoints(tmp_path, tied):
    for changes in (
        {"hidden_size": 64},
        {"ffn_hidden_size": 50},
        {"vocab_size": 97},
        {"num_query_groups": 1},
    ):
        text = refused(CheckpointError, tied, tmp_path / "out", **changes)
        assert "shape" in text, changes
        assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_checkpoint(tmp_path):
    (tmp_path / "state").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        export_to_hf(tmp_path / "state", ranks.configuration({}).model.model_dump(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path, tied, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    with monkeypatch.context() as patch:
        calls = fail_at(patch, 2, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(EnvironmentProblem, match="The disk is full"):
            exported(tied, tmp_path / "out")
    assert len(calls) == 2
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    assert left.name == ".out.partial"
    (kept,) = left.glob("*.safetensors")
    assert kept.name.startswith("model-00001-of-")
    with pytest.raises((OSError, ValueError)):
        load(left)


def fail_at(patch: Any, number: int, error: BaseException) -> list[Any]:
    """Have the flush of the file of that number fail; returns what was flushed."""
    real, calls = resumable.os.fsync, []

    def fsync(descriptor: int) -> None:
        if isinstance(descriptor, int) and os.readlink(f"/proc/self/fd/{descriptor}").endswith(".partial"):
            if Path(f"/proc/self/fd/{descriptor}").resolve().is_file():
                calls.append(descriptor)
            if len(calls) == number:
                raise error
        real(descriptor)

    patch.setattr(resumable.os, "fsync", fsync)
    return calls


def test_what_was_begun_of_other_weights_is_not_gone_on_with(tmp_path, tied):
    # Imported models of one shape have the same metadata to the byte.
    import shutil

    stored = checkpoint_files.read(tied)
    for name in ("one", "other"):
        shutil.copytree(stored.state, tmp_path / name)
    for path in (tmp_path / "other").iterdir():
        os.utime(path, ns=(1, 1 + path.stat().st_mtime_ns))
    assert len({export._identity_of(tmp_path / name) for name in ("one", "other")}) == 2
    assert export._identity_of(tmp_path / "one") == export._identity_of(tmp_path / "one")


def test_what_was_interrupted_is_gone_on_with_and_comes_out_the_same(tmp_path, tied, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    whole = content(exported(tied, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        fail_at(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            exported(tied, tmp_path / "out")
    left = tmp_path / ".out.partial"
    kept = {path.name: path.stat().st_mtime_ns for path in left.glob("*.safetensors")}
    assert len(kept) == 3
    seen: list[tuple[int, int]] = []
    out = exported(tied, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert content(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept, "they were not written again"
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    assert not left.exists() and not list(tmp_path.glob(".*"))


def test_of_another_tokenizer_than_the_interrupted_tries_nothing_is_left(tmp_path, tied):
    for name, files in (("first", ["tokenizer.json", "chat_template.jinja"]), ("second", ["tokenizer.json"])):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text(name)

    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exported(tied, tmp_path / "out", tokenizer=tmp_path / "first", finish=interrupted)
    assert (tmp_path / ".out.partial" / "chat_template.jinja").exists()
    out = exported(tied, tmp_path / "out", tokenizer=tmp_path / "second")
    assert not (out / "chat_template.jinja").exists()
    assert (out / "tokenizer.json").read_text() == "second"


def test_a_lock_whose_file_its_holder_has_removed_is_none(tmp_path, monkeypatch):
    real, taken = resumable.try_lock, []

    def late(path: Path) -> int | None:
        found = real(path)
        if not taken:  # the one before ends between this one's opening and its locking
            path.unlink()
        taken.append(found)
        return found

    monkeypatch.setattr(resumable, "try_lock", late)
    with resumable.only_writer(tmp_path / "out", "exporting"):
        assert len(taken) == 2 and (tmp_path / ".out.lock").exists()
        with (
            pytest.raises(ConfigError, match="Another process"),
            resumable.only_writer(tmp_path / "out", "exporting"),
        ):
            pass


def test_what_was_left_by_another_export_is_not_gone_on_with(tmp_path, tied, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    half = content(exported(tied, tmp_path / "half", dtype="bfloat16"))
    with monkeypatch.context() as patch:
        fail_at(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            exported(tied, tmp_path / "out")
    assert content(exported(tied, tmp_path / "out", dtype="bfloat16")) == half


def test_two_processes_do_not_write_one_export(tmp_path, tied):
    with (
        resumable.unfinished(tmp_path / "out"),
        pytest.raises(ConfigError, match="Another process is writing"),
    ):
        exported(tied, tmp_path / "out")


def test_a_bit_that_has_turned_is_noticed(tmp_path):
    checkpoint = saved(tmp_path / "saved", TIED)
    (path,) = (checkpoint / "state").glob("*.distcp")
    weights = StoredTensors(checkpoint / "state")
    key = weights.read("decoder.layers.mlp.linear_fc2.weight", 1, 2).numpy().tobytes()
    raw = bytearray(path.read_bytes())
    at = raw.index(key[:64])
    raw[at + 40] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"linear_fc2\.weight: its bytes are not those"):
        exported(checkpoint, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()
