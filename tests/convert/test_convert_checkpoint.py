"""`tools/convert_checkpoint.py`: Megatron-LM's flags as words of `davinci`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


def command(text: str) -> Any:
    spec = importlib.util.spec_from_file_location("convert_checkpoint", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.command(text.split())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--model-type GPT --loader llama_mistral --load-dir a --saver core --save-dir b "
            "--target-tensor-parallel-size 2 --make-vocab-size-divisible-by 64",
            "convert from-hf a b --vocab-multiple 64",
        ),
        (
            "--loader core --load-dir a@5 --saver hf --save-dir b --tokenizer-model t",
            "convert to-hf a@5 b --tokenizer t",
        ),
        ("--loader megatron --load-dir a --saver mcore --save-dir b", "convert from-megatron a b"),
    ],
)
def test_flags(flags, words):
    assert command(flags) == words.split()


def test_from_hugging_face_to_it(capsys):
    with pytest.raises(SystemExit):
        command("--loader hf --load-dir a --saver hf --save-dir b")
    assert "both" in capsys.readouterr().err
