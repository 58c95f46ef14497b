"""What the environment holds in secret is in nothing that a run writes or says."""

import os

import pytest

from megatron_davinci.config import validate
from megatron_davinci.errors import ConfigError
from tests.cli.screen import davinci
from tests.ranks import RankFailed, run_ranks
from tests.tiny import tiny_settings, train_here

SECRETS = {
    "HF_TOKEN": "hf_QhWkzvNLrTnEwXbPmYdC",
    "WANDB_API_KEY": "7c1d1f3be2a94b55a0d0c9a7e6f4b3a2d1c0b9a8",
    "AWS_ACCESS_KEY_ID": "AKIAQ3EXAMPLEQ7XKEY1",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI+K7MDENG+bPxRfiCYEXAMPLEKEY",
    "HTTPS_PROXY": "http://me:correct-horse-battery@proxy.invalid:3128",
}


def train_with_secrets(settings, fails):
    from megatron_davinci.train.last_words import LAST_WORDS
    from megatron_davinci.train.loop import TrainingRun

    os.environ.update(SECRETS)
    if fails:
        step = TrainingRun._step

        def failing(self, plan, *rest):
            if plan.step == 6:
                LAST_WORDS.end(1, "a mistake of ours", "RuntimeError")
                raise RuntimeError("a mistake of ours")
            return step(self, plan, *rest)

        TrainingRun._step = failing
    return train_here(settings)


def found_in(folder):
    parts = [secret.encode() for secret in SECRETS.values()] + [b"correct-horse-battery"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 15
    return [path.name for path in files for part in parts if part in path.read_bytes()]


@pytest.mark.long
def test_nothing_of_a_run_has_a_secret_in_it(tmp_path, monkeypatch):
    settings = tiny_settings(tmp_path, train={"stop_after_steps": 8}, checkpoint={"every_steps": 4})
    settings["logging"]["tensorboard"] = True
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankFailed, match="a mistake of ours"):
        run_ranks(2, train_with_secrets, settings, True)
    said = davinci("doctor", tmp_path / "run")
    run_ranks(2, train_with_secrets, settings, False)
    report = davinci("report", tmp_path / "run")
    export = davinci("convert", "to-hf", tmp_path / "run", tmp_path / "run" / "hf", "--skip-verify")
    assert report.code == export.code == 0
    assert found_in(tmp_path / "run") == []
    screens = said.out + said.err + report.out + report.err + export.out + export.err
    assert [secret for secret in SECRETS.values() if secret in screens] == []
    # And the search can find something.
    (tmp_path / "run" / "environment").write_text(os.environ["HF_TOKEN"])
    assert found_in(tmp_path / "run") == ["environment"]


@pytest.mark.parametrize(
    "data",
    [
        {"s3": {"endpoint_url": "https://me:hunter2hunter2@storage.invalid"}},
        {"sources": {"a": {"path": "s3://me:hunter2hunter2@bucket/a"}}},
    ],
)
def test_a_password_in_the_configuration_is_refused_and_not_repeated(data, tmp_path):
    settings = tiny_settings(tmp_path)
    settings["data"] |= data
    with pytest.raises(ConfigError) as refused:
        validate(settings, where="config.yaml")
    assert "environment" in str(refused.value) and "hunter2" not in str(refused.value)
