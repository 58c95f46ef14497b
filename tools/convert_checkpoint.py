"""Convert checkpoints with the flags of Megatron-LM's `tools/checkpoint/convert.py`; `davinci convert` does the work.

    python tools/convert_checkpoint.py --loader llama_mistral --load-dir hf/a --saver core --save-dir weights/a
    python tools/convert_checkpoint.py --loader core --load-dir runs/a --saver hf --save-dir hf/a

A checkpoint here has no layout: `--target-tensor-parallel-size` and `--target-pipeline-parallel-size` are taken, and
change nothing.
"""

from __future__ import annotations

import argparse
import sys

from megatron_davinci.cli.main import main as davinci

_OURS = ("core", "megatron", "mcore")
_HF = ("hf", "llama_mistral", "mixtral_hf")


def command(arguments: list[str]) -> list[str]:
    """The words of `davinci` that do the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-type", choices=("GPT",), default="GPT", help="GPT is the only one")
    parser.add_argument("--loader", required=True, choices=(*_OURS, *_HF), help="what --load-dir is")
    parser.add_argument("--saver", required=True, choices=(*_OURS, "hf"), help="what --save-dir is to be")
    parser.add_argument("--load-dir", required=True, help="run directory, checkpoint, or Hugging Face folder")
    parser.add_argument("--save-dir", required=True, help="the folder to make")
    parser.add_argument("--tokenizer-model", metavar="FOLDER", help="the tokenizer that goes along")
    parser.add_argument("--make-vocab-size-divisible-by", type=int, metavar="N")
    parser.add_argument("--target-tensor-parallel-size", type=int, help="not needed")
    parser.add_argument("--target-pipeline-parallel-size", type=int, help="not needed")
    given = parser.parse_args(arguments)
    to_hf, from_hf = given.saver == "hf", given.loader in _HF
    if to_hf and from_hf:
        parser.error("both --loader and --saver are of Hugging Face")
    if not to_hf and not from_hf:
        return ["convert", "from-megatron", given.load_dir, given.save_dir]
    words = ["convert", "to-hf" if to_hf else "from-hf", given.load_dir, given.save_dir]
    if to_hf and given.tokenizer_model:
        words += ["--tokenizer", given.tokenizer_model]
    if from_hf and given.make_vocab_size_divisible_by:
        words += ["--vocab-multiple", str(given.make_vocab_size_divisible_by)]
    return words


if __name__ == "__main__":
    sys.exit(davinci(command(sys.argv[1:])))
