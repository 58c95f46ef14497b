"""`davinci data train-classifier`: labelled texts to a classifier that `classify` and `select_top` ask."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any


def add_actions(actions: Any) -> None:
    """Declare the action's arguments.

    Args:
        actions: The sub-parsers of `davinci data`.
    """
    train = actions.add_parser("train-classifier", help="train a classifier for selection on labelled texts")
    train.add_argument(
        "files", nargs="*", help="JSONL files (.gz, .zst) or Parquet with a label in each record"
    )
    train.add_argument(
        "--positive", nargs="+", default=[], metavar="FILE", help="files whose label is `positive`"
    )
    train.add_argument(
        "--negative", nargs="+", default=[], metavar="FILE", help="files whose label is `negative`"
    )
    train.add_argument("--out", required=True, help="folder to make")
    train.add_argument("--text-field", default="text", help="field of the text (default: text)")
    train.add_argument(
        "--label-field",
        default="label",
        help="field of the label, as label or labels.quality (default: label)",
    )
    train.add_argument(
        "--at-least",
        type=float,
        metavar="GRADE",
        help="labels are numbers: `positive` from this one on, else `negative`",
    )
    train.add_argument(
        "--encoder",
        type=Path,
        metavar="FOLDER",
        help="a linear head upon the embeddings of this encoder (transformers), instead of hashed words",
    )
    train.add_argument(
        "--tokens", type=int, default=512, help="of a text that the encoder is shown (default: 512)"
    )
    train.add_argument("--held-out", type=float, default=0.2, help="share kept for judging (default: 0.2)")
    train.add_argument("--epochs", type=int, default=10, help="passes over the texts (default: 10)")
    train.add_argument(
        "--bits", type=int, default=18, help="features are 2 to the power of this (default: 18)"
    )
    train.add_argument("--seed", type=int, default=0, help="draws the order of the texts (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Train, judge on held-out texts, and write the classifier."""
    from megatron_davinci.cli.screen import Screen
    from megatron_davinci.darwin import embedding
    from megatron_davinci.darwin.classifiers import train_and_judge
    from megatron_davinci.data.places import local_path
    from megatron_davinci.errors import ConfigError

    out = local_path(arguments.out)
    if not 0 < arguments.held_out < 1:
        raise ConfigError(
            "The held-out share is impossible.", found=arguments.held_out, expected="between 0 and 1"
        )
    if not 8 <= arguments.bits <= 26:
        raise ConfigError("The bits are impossible.", found=arguments.bits, expected="8 to 26")
    for name, least in (("epochs", 1), ("tokens", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            raise ConfigError(
                f"--{name} is too small.", found=getattr(arguments, name), expected=f"{least} or more"
            )
    if arguments.at_least is not None and math.isnan(arguments.at_least):
        raise ConfigError(
            "--at-least is no number, so nothing is from it on.", found="nan", expected="a grade"
        )
    texts, labels = _labelled(arguments)
    options: dict[str, Any] = {"bits": arguments.bits, "epochs": arguments.epochs, "seed": arguments.seed}
    if arguments.encoder is not None:
        options = {"train": embedding.train, "encoder": arguments.encoder, "tokens": arguments.tokens}
    made = train_and_judge(texts, labels, held_out=arguments.held_out, **options)
    made.save(out)
    facts, screen = made.facts, Screen()
    rows = [
        [name, f"{facts['texts'][name]['trained']:,}", f"{facts['texts'][name]['held_out']:,}",
         f"{facts['held_out_auc'][name]:.3f}", f"{facts['length_auc'][name]:.3f}"]
        for name in made.labels
    ]  # fmt: skip
    screen.table(
        "on held-out texts",
        [("label", "left"), ("trained on", "right"), ("held out", "right"), ("AUC", "right"),
         ("AUC by length alone", "right")],
        rows,
    )  # fmt: skip
    screen.console.print(
        f"\nbalanced accuracy {facts['held_out_accuracy']:.3f}, by length alone {facts['length_accuracy']:.3f}, "
        f"by chance {1 / len(made.labels):.3f}\n{arguments.out}",
        soft_wrap=True,
    )
    if facts["held_out_accuracy"] <= facts["length_accuracy"]:
        screen.console.print("It tells no more than length does: give more or better labels.", style="yellow")
    return 0


def _labelled(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    from megatron_davinci.data.jsonl import Fields
    from megatron_davinci.data.text_inputs import find, read_documents
    from megatron_davinci.errors import ConfigError

    texts: list[str] = []
    labels: list[str] = []
    for path in find(arguments.files) if arguments.files else []:
        # The label stands where a prompt would, and the text where its answer would.
        fields = Fields(arguments.text_field, arguments.label_field, arguments.text_field)
        for document in read_documents(path, fields, numbers=True):
            labels.append(document.text)
            texts.append(document.response or "")
    if arguments.at_least is not None:
        labels = [_side(label, arguments.at_least) for label in labels]
    for label, files in (("positive", arguments.positive), ("negative", arguments.negative)):
        for path in find(files) if files else []:
            found = [document.text for document in read_documents(path, Fields(arguments.text_field))]
            texts += found
            labels += [label] * len(found)
    if not texts:
        raise ConfigError(
            "There is nothing to train on.",
            expected="files with labels, or --positive and --negative files",
        )
    return texts, labels


def _side(label: str, least: float) -> str:
    from megatron_davinci.errors import DataError

    try:
        grade = float(label)
        if math.isnan(grade):
            raise ValueError(label)
        return "positive" if grade >= least else "negative"
    except ValueError:
        raise DataError(
            "A label is no number.",
            found=label,
            expected="numbers, for --at-least",
            do="leave --at-least out",
        ) from None


ACTIONS = ("train-classifier",)
