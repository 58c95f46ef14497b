"""`davinci import-megatron`: a script in, a configuration out, and all that is lost on the screen."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import yaml

from megatron_davinci.cli.main import main
from megatron_davinci.config import load_config
from tests.cli.screen import davinci

COMMANDS = Path(__file__).parents[1] / "convert" / "commands"
MISTRAL = COMMANDS / "mistral_7b.sh"


def test_a_script_becomes_a_configuration_that_plan_accepts(tmp_path):
    out = tmp_path / "config.yaml"
    screen = davinci("import-megatron", MISTRAL, "--out", out)
    assert (screen.code, screen.out) == (0, "")
    for said in (
        "carried over: ",
        "no effect here: ",
        "NOT CARRIED OVER: 2",
        "--window-size 4096,0",
        "7,241,732,096",
    ):
        assert said in screen.err
    plan = davinci("plan", out, "--ranks", 32)
    assert plan.code == 0
    assert "TP2 x PP2 x DP8 = 32 ranks" in plan.out
    assert "7,241,732,096" in plan.out


def test_without_out_the_yaml_alone_is_on_standard_output(tmp_path):
    screen = davinci("import-megatron", MISTRAL)
    (tmp_path / "config.yaml").write_text(screen.out)
    assert load_config(tmp_path / "config.yaml").model.num_layers == 32
    assert screen.out.startswith("# Made by")
    assert yaml.safe_load(screen.out)["data"]["sources"]["web"] == {"path": "/d/web_text_document"}


def test_who_stops_reading_is_told_nothing(capsys, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        assert main(["import-megatron", str(MISTRAL)]) == 128 + signal.SIGPIPE
    assert "Traceback" not in capsys.readouterr().err


def test_strict_ends_with_2_and_writes_all_the_same(tmp_path):
    out = tmp_path / "config.yaml"
    assert davinci("import-megatron", MISTRAL, "--strict", "--out", out).code == 2
    load_config(out)
    script = tmp_path / "args.txt"
    text = MISTRAL.read_text().replace("--window-size 4096,0", "--most-recent-k 4")
    script.write_text(text)
    assert davinci("import-megatron", script, "--strict", "--out", out).code == 0
    assert "NOT carried over" not in out.read_text()


def test_variables_that_the_script_does_not_set_can_be_given():
    script = COMMANDS / "gpt3_857m.sh"
    assert yaml.safe_load(davinci("import-megatron", script).out)["run"]["directory"] == "$1"
    screen = davinci("import-megatron", script, "--set", "1=/runs/x", "--set", "5=/data/web_text_document")
    settings = yaml.safe_load(screen.out)
    assert (settings["run"]["directory"], settings["data"]["sources"]) == (
        "/runs/x",
        {"web": {"path": "/data/web_text_document"}},
    )


OF_MANY_SIZES = """
SIZE=$1 SEQ=$2 ITERS=$(( ${3} / 4 / ${SEQ} )) LOW=$(bc <<< "$4 / 10")
if [ $SIZE = 7B ]; then
LAYERS=32
elif [ $SIZE = 13B ]; then
LAYERS=40
fi
python prepare_data.py --split 98,2,0 --seed 3
cmd="torchrun --nproc_per_node 4 pretrain_x.py --num-layers $LAYERS --hidden-size 64 --num-attention-heads 4
 --seq-length $SEQ --max-position-embeddings $SEQ --micro-batch-size 1 --global-batch-size 4 --lr 1e-3
 --train-iters $ITERS --min-lr $LOW --vocab-size 512 --swiglu --position-embedding-type rope"
echo ${cmd}
eval ${cmd}
"""


def test_what_a_script_of_many_sizes_lacks_is_asked_for_by_the_argument_that_decides_it(tmp_path):
    script = tmp_path / "run.sh"
    script.write_text(OF_MANY_SIZES)
    text = davinci("import-megatron", script).refusal()
    assert "$LAYERS is not known: --set 1=VALUE, which decides it, or --set LAYERS=VALUE" in text
    assert "$(( ${3} / 4 / $2 )) is not known: --set 3=VALUE" in text
    assert "expected exactly one of the two" not in text and "--called-with 'FIRST SECOND ...'" in text
    text = davinci("import-megatron", script, "--called-with", "7B 64 2560 1e-3").refusal()
    assert '$(bc <<< "$4 / 10") is not known: write its value in its place' in text and "LAYERS" not in text
    for words, layers in ((["--called-with", "13B 64 2560"], 40), (["--set", "2=64", "--set", "3=2560"], 12)):
        script.write_text(OF_MANY_SIZES.replace('$(bc <<< "$4 / 10")', "0"))
        screen = davinci("import-megatron", script, *words, "--set", "LAYERS=12")
        settings = yaml.safe_load(screen.out)
        assert (settings["model"]["num_layers"], settings["model"]["max_sequence_length"]) == (layers, 64)
        assert settings["curriculum"][0]["tokens"] == 2560


@pytest.mark.parametrize(
    ("text", "options", "named"),
    [
        ("--lr 1", ("--called-with", "'dsw"), "--called-with"),
        (None, (), "There is no such script."),
        ("echo hello", (), "no launch command"),
        ("X=(1 2\ntorchrun pretrain_gpt.py --lr 1", (), ".sh:1"),
        (
            "torchrun pretrain_gpt.py --lr 1 --train-iters 5 --train-samples 5",
            (),
            "line 1: --train-samples 5",
        ),
        ("--lr 1", ("--set", "X"), "NAME=VALUE"),
        ("--lr 1", ("--vocab-size", "0"), "--vocab-size"),
        (b"\xff\xfe\x00", (), "cannot be read"),
        ("--lr 1\x1b[31m\n--num-layers \x1b[5m", (), "--num-layers"),
    ],
)
def test_what_cannot_be_translated_is_said_on_one_screen(tmp_path, text, options, named):
    script = tmp_path / "run.sh"
    if text is not None:
        script.write_bytes(text if isinstance(text, bytes) else text.encode())
    out = tmp_path / "config.yaml"
    screen = davinci("import-megatron", script, "--out", out, *options)
    assert named in screen.refusal()
    assert "\x1b" not in screen.err
    assert not out.exists()
