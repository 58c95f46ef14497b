"""`davinci convert from-hf`: a Hugging Face model becomes a checkpoint that a run can begin with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_davinci.errors import ConfigError, DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", type=Path, help="folder with config.json and safetensors files")
    parser.add_argument("out", type=Path, help="the checkpoint's folder to make")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    parser.add_argument(
        "--vocab-multiple",
        type=int,
        default=128,
        metavar="N",
        help="pad the vocabulary to a multiple of N, so that tensor ranks divide it (default: 128; 1 for none)",
    )
    parser.add_argument(
        "--extend-with",
        type=Path,
        metavar="TOKENIZER",
        help="folder of a tokenizer that has the model's tokens and more; the new ones get rows",
    )
    parser.add_argument(
        "--new-tokens",
        choices=("mean", "normal", "subwords", "zeros"),
        default="mean",
        help="what these rows begin with: the mean of all, a draw about it, the mean of the tokens that the old "
        "tokenizer writes the new one with, zeros (default: mean)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --new-tokens normal")
    parser.add_argument("--skip-verify", action="store_true", help="do not hold it against transformers")


def run(arguments: argparse.Namespace) -> int:
    """Import."""
    import_model(
        arguments.model,
        arguments.out,
        dtype=arguments.dtype,
        vocab_multiple=arguments.vocab_multiple,
        extend_with=arguments.extend_with,
        new_tokens=arguments.new_tokens,
        seed=arguments.seed,
        verify=not arguments.skip_verify,
    )
    return 0


def import_model(
    folder: Path,
    out: Path,
    *,
    dtype: str | None = None,
    vocab_multiple: int = 128,
    extend_with: Path | None = None,
    new_tokens: str = "mean",
    seed: int = 0,
    verify: bool = True,
) -> None:
    """Make a checkpoint of ours of a Hugging Face model, and say how a run begins with it.

    Args:
        folder: With `config.json` and safetensors files.
        out: The folder to make.
        dtype: See `convert.hf_model.HFModel.of`.
        vocab_multiple: Likewise.
        extend_with: Folder of a tokenizer whose new tokens get rows.
        new_tokens: What these begin with.
        seed: Of what is drawn.
        verify: Hold it against transformers before it appears.
    """
    from megatron_davinci.cli.convert_new import new_checkpoint
    from megatron_davinci.cli.convert_progress import bar
    from megatron_davinci.cli.convert_verify import verified
    from megatron_davinci.config.model import ModelConfig
    from megatron_davinci.convert.hf_model import HFModel
    from megatron_davinci.convert.new_tokens import NewTokens
    from megatron_davinci.train import checkpoint_files
    from megatron_davinci.train.new_files import NewFiles

    if vocab_multiple < 1:
        raise ConfigError(
            "A vocabulary is padded to a multiple of at least one.",
            where="--vocab-multiple",
            found=vocab_multiple,
        )
    if extend_with is None and new_tokens != "mean":
        raise ConfigError(
            "New tokens come from a tokenizer that has them.",
            where="--new-tokens",
            found=new_tokens,
            do="name the tokenizer with --extend-with, or leave --new-tokens out",
        )
    new = _new_tokens(folder, extend_with, new_tokens, seed) if extend_with else NewTokens()
    found = HFModel.of(folder, dtype=dtype, vocab_multiple=vocab_multiple, new=new)
    with new_checkpoint(out) as temporary:
        files = NewFiles(temporary)
        with bar(f"importing {folder.name}") as progress:
            found.write(temporary / "state", files.open, progress)
        verification = None
        if verify:
            said = verified(
                folder,
                temporary / "state",
                found.family,
                found.model,
                tokenizer=folder,
                dtype=found.dtype,
                tokens=new.first if new.count else None,
            )
            verification = said.facts()
        description = {
            "step": 0,
            "consumed_samples": 0,
            "model": found.model,
            "weights_only": True,
            "from": {
                "program": "transformers",
                "folder": str(folder.resolve()),
                "family": found.family.name,
                "new_tokens": new.count,
                "verification": verification,
            },
        }
        checkpoint_files.commit(temporary, out, description, files.entries, latest=False)
    parameters = ModelConfig.model_validate(found.model).parameters()
    print(f"{out}: the weights of {folder}, a {found.family.name} model of {parameters:,} parameters")
    if new.count:
        print(f"{new.count:,} new tokens, from id {new.first:,} on ({new.how})")
    for line in found.left:
        print(f"not carried over: {line}")
    print("\nIn the configuration of a run that begins with them:\n")
    print(_sections(found.model, out, extend_with or folder))


def _sections(model: dict[str, Any], out: Path, tokenizer: Path) -> str:
    import yaml

    from megatron_davinci.config.model import ModelConfig

    optional = {
        name: field.default for name, field in ModelConfig.model_fields.items() if not field.is_required()
    }
    kept = {key: value for key, value in model.items() if key not in optional or value != optional[key]}
    sections: dict[str, Any] = {"model": kept}
    if (tokenizer / "tokenizer.json").exists():
        sections["data"] = {"tokenizer": str(tokenizer)}
    return yaml.safe_dump({**sections, "checkpoint": {"initial_weights": str(out)}}, sort_keys=False)


def _new_tokens(folder: Path, extend_with: Path, how: str, seed: int) -> Any:
    """What a tokenizer has beyond the model's own."""
    from megatron_davinci.convert.new_tokens import NewTokens

    old, new = _vocabulary(folder), _vocabulary(extend_with)
    moved = [
        f"{name!r}: {id_}, now {new.get(name, 'gone')}" for name, id_ in old.items() if new.get(name) != id_
    ]
    if moved:
        raise DataError(
            "The new tokenizer does not have the tokens of the model's own.",
            where=extend_with / "tokenizer.json",
            found="\n".join(moved[:5]) + (f"\nand {len(moved) - 5:,} more" if len(moved) > 5 else ""),
            expected=f"the tokens of {folder / 'tokenizer.json'} with the same ids, and others behind them",
            do="add tokens to the model's own tokenizer",
        )
    first = max(old.values()) + 1
    names = {id_: name for name, id_ in new.items()}
    count = max(names) + 1 - first
    pieces = None
    if how == "subwords" and count:
        pieces = _pieces(folder, [names.get(id_) for id_ in range(first, first + count)])
    return NewTokens(first, count, how, seed, pieces)  # type: ignore[arg-type]


def _vocabulary(folder: Path) -> dict[str, int]:
    tokenizer = _load(folder)
    found: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return found


def _pieces(folder: Path, names: list[str | None]) -> list[list[int]]:
    """The ids that the old tokenizer writes each name with; of a hole in the numbers, its first token's."""
    tokenizer = _load(folder)
    decoder = tokenizer.decoder
    texts = [decoder.decode([name]) if name and decoder is not None else name or "" for name in names]
    ids = [one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=False)]
    return [one or [0] for one in ids]


def _load(folder: Path) -> Any:
    import tokenizers

    path = folder / "tokenizer.json"
    try:
        json.loads(path.read_bytes())
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise DataError(
            "The tokenizer cannot be read.",
            where=path,
            found=error,
            do="name a folder that has a tokenizer.json; a vocabulary is extended from one to another",
        ) from error
