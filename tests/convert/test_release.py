"""A release says what it is, where it is from, and how it was made; all kept checkpoints go out as revisions."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import yaml
from huggingface_hub import HfApi

from megatron_davinci.cli import convert_release
from megatron_davinci.cli.convert_to_hf import end_of_documents, export
from megatron_davinci.cli.main import main
from megatron_davinci.config import load_config
from megatron_davinci.config.training import OptimizerConfig
from megatron_davinci.convert import card
from megatron_davinci.data.manifest import Manifest
from megatron_davinci.errors import CheckpointError, ConfigError, DataError, EnvironmentProblem
from tests import tiny
from tests.convert.test_hf_model import write_tokenizer
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("release")
    settings = tiny.tiny_settings(
        root,
        train={"stop_after_steps": 16},
        checkpoint={"every_steps": 8, "keep": 2},
        evaluation={"every_steps": 8, "sequences": 2},
    )
    run_ranks(1, tiny.train_here, settings)
    return root / "run"


@pytest.fixture(scope="module")
def released(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tree") / "out"
    assert (
        main(["convert", "release", str(run), str(out), "--dtype", "bfloat16", "--licence", "apache-2.0"])
        == 0
    )
    return out


def test_a_folder_for_every_checkpoint_and_the_newest_is_main(released):
    assert sorted(path.name for path in released.iterdir()) == [
        "revisions.json",
        "step-00000008",
        "step-00000016",
    ]
    revisions = json.loads((released / "revisions.json").read_text())
    assert [(one["revision"], one["folder"]) for one in revisions] == [
        ("main", "step-00000016"),
        ("step16", "step-00000016"),
        ("step8", "step-00000008"),
    ]
    assert revisions[2]["tokens"] == 8 * 4 * tiny.LENGTH
    assert sorted(path.name for path in (released / "step-00000008").iterdir()) == [
        "README.md",
        "config.json",
        "curves.png",
        "generation_config.json",
        "model.safetensors",
        "training_manifest.json",
    ]


def test_the_card_is_filled_from_the_run(released):
    card = (released / "step-00000016" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "apache-2.0" and front["library_name"] == "transformers"
    for said in (
        "step 16",
        "| Class | `Qwen2ForCausalLM` of transformers |",
        "| Layers | 2 |",
        "| Weights | bfloat16 |",
        "weight decay 0.1",
        "| first | 6.14k | 4, then 8 |",
        "| a | 75% |",
        "Held-out text, after step 16.",
        "![Held-out loss",
        "tensors equal to the bit",
        "AutoModelForCausalLM.from_pretrained",
        "apache-2.0",
    ):
        assert said in card, said
    earlier = (released / "step-00000008" / "README.md").read_text()
    assert "Held-out text, after step 8." in earlier
    assert (released / "step-00000008" / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (
            {},
            "AdamW, beta1 0.9, beta2 0.95, epsilon 1e-08; weight decay 0.1, gradients clipped to a norm of 1.0",
        ),
        ({"kind": "muon"}, "Muon with momentum 0.95 for the layers' matrices; for all else AdamW, beta1 0.9"),
        ({"clip_grad_norm": 0}, "weight decay 0.1, gradients not clipped"),
    ],
)
def test_the_card_names_the_optimizer_that_trained(optimizer, said):
    assert said in card._optimizer(OptimizerConfig(**optimizer).model_dump())


@pytest.mark.parametrize(
    ("option", "value", "was"), [("--dtype", "float32", "bfloat16"), ("--family", "llama", "qwen2")]
)
def test_folders_that_are_there_in_another_way_are_not_taken_for_what_is_asked(
    run, released, tmp_path, capsys, option, value, was
):
    out = Path(shutil.copytree(released, tmp_path / "out"))
    assert main(["convert", "release", str(run), str(out), option, value]) != 0
    said = capsys.readouterr().err
    assert said.count(f"{option}: {was}, not {value}") == 2 and "name another one to release to" in said


def test_a_stage_ends_where_all_up_to_it_have_had_their_tokens():
    stages = [
        {"name": name, "tokens": tokens} for name, tokens in (("first", 4 * 10**12), ("then", 2 * 10**12))
    ]
    assert [(row[0], row[1]) for row in card._stages(stages)] == [("first", "4T"), ("then", "6T")]


def test_the_manifest_has_what_decided_the_run_and_no_paths(released, run):
    folder = released / "step-00000008"
    manifest = json.loads((folder / "training_manifest.json").read_text())
    assert manifest["run"]["seed"] == 7 and manifest["checkpoint"]["step"] == 8
    assert manifest["verification"]["max_logit_difference"] < 1e-4
    assert [one["step"] for one in manifest["run"]["evaluations"]] == [8]
    assert str(run.parent) not in json.dumps(manifest)
    for name, entry in manifest["files"].items():
        raw = (folder / name).read_bytes()
        assert entry == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    assert manifest["files"].keys() == {path.name for path in folder.iterdir()} - {"training_manifest.json"}


def test_the_same_checkpoint_gives_the_same_bytes(released, run, tmp_path):
    again = export(f"{run}@8", tmp_path / "again", dtype="bfloat16", licence="apache-2.0")
    for path in again.iterdir():
        assert path.read_bytes() == (released / "step-00000008" / path.name).read_bytes(), path.name


def test_a_model_ends_texts_with_what_ended_the_documents_that_it_was_trained_on(run, tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", [f"t{n}" for n in range(9)])
    config = load_config(run / "config.yaml")
    ends = {Manifest.load(source.path).eod_id for source in config.data.sources.values()}
    assert {end_of_documents(config, tokenizer)} == ends and end_of_documents(config, None) is None
    gone = {
        name: one.model_copy(update={"path": tmp_path / "gone"}) for name, one in config.data.sources.items()
    }
    elsewhere = config.model_copy(update={"data": config.data.model_copy(update={"sources": gone})})
    for nobody_says in (None, elsewhere):
        with pytest.raises(DataError):  # the tokenizer has none of its own
            end_of_documents(nobody_says, tokenizer)


def test_a_check_that_was_skipped_is_said(run, tmp_path):
    card = (export(f"{run}@8", tmp_path / "out", verify=False) / "README.md").read_text()
    assert "**Not verified**" in card and "None was stated" in card and "license:" not in card


def test_a_damaged_checkpoint_does_not_keep_the_others(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoints" / "step-00000016" / "manifest.json").write_text("{}")
    given = argparse.Namespace(
        run=copy,
        out=tmp_path / "out",
        dtype=None,
        tokenizer=None,
        family=None,
        licence=None,
        skip_verify=True,
    )
    with pytest.raises(EnvironmentProblem, match="step-00000016"):
        convert_release.release(given)
    revisions = json.loads((tmp_path / "out" / "revisions.json").read_text())
    assert [one["revision"] for one in revisions] == ["main", "step8"]


def test_a_step_that_was_saved_anew_is_not_released_as_it_was(run, released, tmp_path):
    out = shutil.copytree(released, tmp_path / "out")
    path = out / "step-00000016" / "training_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["checkpoint"]["sha256"] = "0" * 64  # of what was there before
    path.write_text(json.dumps(manifest))
    given = argparse.Namespace(
        run=run, out=out, dtype=None, tokenizer=None, family=None, licence=None, skip_verify=True
    )
    with pytest.raises(EnvironmentProblem, match="another checkpoint of this step"):
        convert_release.release(given)
    revisions = json.loads((out / "revisions.json").read_text())
    assert [one["revision"] for one in revisions] == ["main", "step8"]


# ---- uploading; no network: the library's own class, whose methods are checked for their arguments and note them


def hub() -> Any:
    return create_autospec(HfApi, instance=True)


def test_each_checkpoint_goes_to_its_revision(released):
    api = hub()
    said = convert_release.upload(released, "lab/model", api, private=True)
    api.create_repo.assert_called_once_with("lab/model", private=True, exist_ok=True)
    assert [call.kwargs["branch"] for call in api.create_branch.call_args_list] == ["step16", "step8"]
    assert [
        (call.kwargs["revision"], Path(call.kwargs["folder_path"]).name)
        for call in api.upload_folder.call_args_list
    ] == [
        ("main", "step-00000016"),
        ("step16", "step-00000016"),
        ("step8", "step-00000008"),
    ]
    assert len(said) == 3


def test_nothing_is_uploaded_of_a_release_with_a_broken_part(released, tmp_path):
    import shutil

    copy = shutil.copytree(released, tmp_path / "copy")
    weights = copy / "step-00000008" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    api = hub()
    with pytest.raises(CheckpointError, match="cut short"):
        convert_release.upload(copy, "lab/model", api)
    assert not api.method_calls


@pytest.mark.parametrize(
    "listed", ["{", '[{"folder": "step-00000008"}]', "[1]", '[{"revision": "main", "folder": 5}]']
)
def test_a_list_of_revisions_that_is_none(tmp_path, listed):
    (tmp_path / "revisions.json").write_text(listed)
    with pytest.raises(CheckpointError, match=r"revisions\.json"):
        convert_release.upload(tmp_path, "lab/model", hub())


def test_a_run_of_a_run_is_refused(run, tmp_path, capsys):
    assert main(["convert", "to-hf", str(run), str(tmp_path / "out"), "--run", str(tmp_path)]) == 2
    assert "leave --run out" in capsys.readouterr().err


def test_what_the_hub_refuses_is_said_and_a_token_is_needed(released, monkeypatch, tmp_path):
    api = hub()
    api.upload_folder.side_effect = OSError("403 Forbidden")
    with pytest.raises(EnvironmentProblem, match="403 Forbidden"):
        convert_release.upload(released / "step-00000016", "lab/model", api)
    with pytest.raises(ConfigError, match="NAME/MODEL"):
        convert_release.upload(released, "model", api)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert main(["convert", "push", str(released), "lab/model"]) == 2
    assert main(["convert", "push", str(released), "lab/model", "--token-file", str(tmp_path / "none")]) == 2
