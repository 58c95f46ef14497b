"""A launch command of Megatron-LM as a run configuration, and what of it could not be carried over."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_davinci.config import RunConfig, check_layout, validate
from megatron_davinci.convert import megatron_flags, megatron_layout, megatron_levers, megatron_muon
from megatron_davinci.convert.megatron_command import find_command
from megatron_davinci.convert.megatron_curriculum import curriculum, sources
from megatron_davinci.convert.megatron_ledger import Entry, Ledger, lines_of
from megatron_davinci.errors import ConfigError

GPT2_VOCABULARY = 50257
_DIRECTORY = "runs/from-megatron-lm"
_MODEL = "expect another model than the command's"


@dataclass(frozen=True)
class Imported:
    """What became of a command.

    Attributes:
        where: The script's name.
        settings: The configuration as plain settings.
        config: The same, validated.
        carried: Flags that are in it.
        idle: Flags without effect here.
        lost: Flags, and defaults of Megatron-LM, that are not carried over.
        ranks: Processes that the command starts, if it says so.
    """

    where: str
    settings: dict[str, Any]
    config: RunConfig
    carried: list[Entry]
    idle: list[Entry]
    lost: list[Entry]
    ranks: int | None

    def as_yaml(self) -> str:
        """The configuration, with what was not carried over as comments before it."""
        head = [f"Made by `davinci import-megatron` of {Path(self.where).name}."]
        if self.lost:
            head += ["", "NOT carried over:", *(f"- {line}" for line in lines_of(self.lost))]
        comments = "".join(f"# {_printable(line)}".rstrip() + "\n" for line in head)
        return comments + "\n" + yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True, width=110)


def import_megatron(
    text: str, where: str, given: Mapping[str, str] | None = None, vocab_size: int | None = None
) -> Imported:
    """Translate a launch command.

    Args:
        text: A shell script, or the flags alone.
        where: Its name, for messages.
        given: Variables that the script does not set; names of digits are what it is called with.
        vocab_size: Tokens of the tokenizer, where the command does not say.

    Raises:
        ConfigError: The script cannot be read, the command contradicts itself, or it does not say enough.
    """
    command = find_command(text, where, given or {})
    ledger = Ledger.of(command, where)
    parallel = _parallel(ledger)
    model = _model(ledger, parallel["tensor"], vocab_size)
    parallel |= megatron_layout.pipeline(ledger, parallel["pipeline"], model.get("num_layers", 0))
    megatron_layout.experts(ledger, model, parallel)
    ranks = command.ranks()
    batches = curriculum(ledger, _default_batch(ledger, parallel, ranks))
    data, mixture = sources(ledger)
    for stage in batches:
        stage["mixture"] = mixture
        if transforms := _transforms(ledger):
            stage["transforms"] = transforms
    settings: dict[str, Any] = {
        "run": _run(ledger),
        "model": model,
        "parallel": parallel,
        "backends": _backends(ledger),
        "data": data,
        "curriculum": [_ordered(stage) for stage in batches],
        "optimizer": _optimizer(ledger, parallel["tensor"]),
        "train": _train(ledger),
        "checkpoint": _checkpoint(ledger),
        "evaluation": _evaluation(ledger, batches),
        "logging": _logging(ledger),
    }
    ledger.close()
    if ledger.problems:
        raise ConfigError(
            "The command cannot be translated.",
            where=where,
            found="\n".join(ledger.problems[:12]),
            do="say what the script is called with: --called-with 'FIRST SECOND ...'"
            if any(re.search(r"--set \d", problem) for problem in ledger.problems)
            else "mend the command; Megatron-LM would not take it either, or it does not say enough",
        )
    config = validate(settings, where=f"{where}, translated")
    check_layout(config, config.parallel.model_ranks)
    _say_where_it_does_not_fit(ledger, config, ranks)
    return Imported(where, settings, config, ledger.carried, ledger.idle, ledger.lost, ranks)


# ---- sections --------------------------------------------------------------------------------------------


def _copy(ledger: Ledger, section: str, whole: tuple[str, ...], real: tuple[str, ...] = ()) -> dict[str, Any]:
    """The flags of a section that are copied, whether they are given or not: `--flag=default`."""
    found: dict[str, Any] = {}
    for names, read in ((whole, ledger.integer), (real, ledger.number)):
        for pair in names:
            name, _, default = pair.partition("=")
            key = megatron_flags.FLAGS[name].what.removeprefix(f"{section}.")
            value = read(name)
            if value is None and default:
                value = int(default) if names is whole else float(default)
            if value is not None:
                found[key] = value
            ledger.carry(name, f"{section}.{key}")
    return found


def _parallel(ledger: Ledger) -> dict[str, Any]:
    found = _copy(
        ledger, "parallel",
        ("--tensor-model-parallel-size=1", "--pipeline-model-parallel-size=1", "--context-parallel-size=1"),
    )  # fmt: skip
    for name in ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"):
        if found[megatron_flags.FLAGS[name].what.removeprefix("parallel.")] < 1:
            ledger.problem(name, expected="1 or more")
            found[megatron_flags.FLAGS[name].what.removeprefix("parallel.")] = 1
    if found["tensor"] > 1:
        found["sequence"] = ledger.has("--sequence-parallel")
        ledger.carry("--sequence-parallel", "parallel.sequence")
    ledger.ignore("--sequence-parallel", "there is one tensor-parallel rank; Megatron-LM turns it off too")
    found["distributed_optimizer"] = ledger.has("--use-distributed-optimizer") or megatron_muon.shards(ledger)
    found["overlap_gradient_reduce"] = ledger.has("--overlap-grad-reduce")
    found["timeout_seconds"] = 60.0 * (ledger.number("--distributed-timeout-minutes", 10.0) or 10.0)
    for name, key in (
        ("--use-distributed-optimizer", "distributed_optimizer"),
        ("--overlap-grad-reduce", "overlap_gradient_reduce"),
        ("--distributed-timeout-minutes", "timeout_seconds"),
    ):
        ledger.carry(name, f"parallel.{key}")
    return {**found, **megatron_levers.parallel(ledger, found)}


def _model(ledger: Ledger, tensor: int, vocab_size: int | None) -> dict[str, Any]:
    for name in ("--num-layers", "--hidden-size", "--num-attention-heads", "--max-position-embeddings"):
        if not ledger.has(name):
            ledger.problem(name, expected="that the command gives it, as Megatron-LM requires")
    found = _copy(
        ledger, "model",
        ("--num-layers", "--hidden-size", "--num-attention-heads", "--ffn-hidden-size", "--kv-channels",
         "--max-position-embeddings"),
        ("--norm-epsilon=1e-5", "--init-method-std=0.02", "--rotary-base=10000"),
    )  # fmt: skip
    hidden, heads = found.get("hidden_size", 0), found.get("num_attention_heads", 0)
    gated = ledger.has("--swiglu")
    # Two thirds of 4 h, in multiples of 64, keep the parameters of an MLP that has a third matrix.
    found.setdefault("ffn_hidden_size", hidden * 8 // 3 // 64 * 64 if gated else 4 * hidden)
    found["num_query_groups"] = heads
    if ledger.has("--group-query-attention"):
        if not ledger.has("--num-query-groups"):
            ledger.problem("--group-query-attention", expected="--num-query-groups with it")
        found["num_query_groups"] = ledger.integer("--num-query-groups", heads)
        ledger.carry("--group-query-attention", "model.num_query_groups")
        ledger.carry("--num-query-groups", "model.num_query_groups")
    ledger.ignore("--num-query-groups", "Megatron-LM reads it with --group-query-attention only")
    found["vocab_size"] = _vocabulary(ledger, tensor, vocab_size)
    found["tie_embeddings"] = not ledger.has("--untie-embeddings-and-output-weights")
    ledger.carry("--untie-embeddings-and-output-weights", "model.tie_embeddings: false")
    biases = not ledger.has("--disable-bias-linear")
    found["qkv_bias"] = biases or ledger.has("--add-qkv-bias")
    ledger.carry("--add-qkv-bias", "model.qkv_bias")
    ledger.carry("--disable-bias-linear", "model.qkv_bias, unless --add-qkv-bias")
    if biases:
        ledger.lose_default("--disable-bias-linear", "only query, key and value have biases", _MODEL)
    found["dropout"] = _dropout(ledger)
    if ledger.has("--qk-layernorm"):
        found["qk_norm"] = True
        ledger.carry("--qk-layernorm", "model.qk_norm")
    return found


def _backends(ledger: Ledger) -> dict[str, str]:
    """Whose implementations run, where the command says."""
    found = {}
    layers = ledger.text("--transformer-impl", "transformer_engine")
    if ledger.has("--transformer-impl") and layers in ("local", "transformer_engine"):
        found["layers"] = layers
        ledger.carry("--transformer-impl", "backends.layers")
    ledger.lose("--transformer-impl", "there are no such layers", "set backends.layers")
    return found


def _dropout(ledger: Ledger) -> float:
    rates = {name: ledger.number(name, 0.1) or 0.0 for name in ("--attention-dropout", "--hidden-dropout")}
    least = min(rates.values())
    for name, rate in rates.items():
        if rate == least:
            ledger.carry(name, "model.dropout")
        else:
            why, do = f"one rate serves attention and residuals: {least:g} is written", "choose model.dropout"
            ledger.lose(name, why, do)
            if not ledger.has(name):
                ledger.lose_default(f"{name} {rate:g}", why, do)
    return least


def _vocabulary(ledger: Ledger, tensor: int, vocab_size: int | None) -> int:
    kind = ledger.text("--tokenizer-type", "GPT2BPETokenizer") or ""
    said = ledger.integer("--vocab-size", vocab_size or megatron_layout.tokenizer_size(ledger), 1)
    if said is None and kind == "GPT2BPETokenizer":
        said = GPT2_VOCABULARY
        ledger.lose_default(
            f"--vocab-size {said:,}",
            "GPT-2's vocabulary is taken for the tokenizer's",
            "--vocab-size N if it is not",
        )
    if kind in ("HuggingFaceTokenizer", "NullTokenizer"):
        ledger.carry("--tokenizer-type", "data.tokenizer" if "Face" in kind else "model.vocab_size")
    why = f"{kind} is not read: a tokenizer is a folder with tokenizer.json"
    ledger.lose("--tokenizer-type", why, "make one of it; set data.tokenizer, which export copies")
    padded = ledger.integer("--padded-vocab-size", None, 1)
    if padded is not None:
        ledger.carry("--padded-vocab-size", "model.vocab_size")
        ledger.ignore("--vocab-size", "--padded-vocab-size says more")
        ledger.ignore("--make-vocab-size-divisible-by", "--padded-vocab-size says more")
        return padded
    multiple = (ledger.integer("--make-vocab-size-divisible-by", 128, 1) or 1) * tensor
    if said is None:
        name = "--tokenizer-model" if ledger.has("--tokenizer-model") else "--vocab-size"
        ledger.problem(name, expected="a vocabulary's size: davinci import-megatron --vocab-size N")
        said = multiple
    rounded = -(-said // multiple) * multiple
    ledger.carry("--vocab-size", f"model.vocab_size, padded to {rounded:,}")
    ledger.carry("--make-vocab-size-divisible-by", "model.vocab_size")
    return rounded


def _transforms(ledger: Ledger) -> dict[str, Any]:
    if not ledger.has("--reset-attention-mask"):
        ledger.ignore("--reset-position-ids", "RoPE in Megatron-LM does not read them")
        ledger.lose("--eod-mask-loss", "it comes with a document mask here", "transforms.document_mask: true")
        return {}
    ledger.carry("--reset-attention-mask", "curriculum.*.transforms.document_mask")
    ledger.carry("--reset-position-ids", "curriculum.*.transforms.reset_positions")
    ledger.carry("--eod-mask-loss", "curriculum.*.transforms.document_mask: no label crosses documents")
    return {"document_mask": True, "reset_positions": ledger.has("--reset-position-ids")}


def _run(ledger: Ledger) -> dict[str, Any]:
    directory = ledger.text("--save") or _DIRECTORY
    ledger.carry("--save", "run.directory")
    if not ledger.has("--save"):
        ledger.lose_default(
            "--save", f"a run has a directory: {_DIRECTORY} is written", "choose run.directory"
        )
    if ledger.text("--load") == directory:
        ledger.carry("--load", "run.directory: an existing run in it goes on")
    ledger.lose("--load", "a run goes on in its own directory only", megatron_flags.WEIGHTS)
    return {"directory": directory, **_copy(ledger, "run", ("--seed=1234",))}


def _optimizer(ledger: Ledger, tensor: int) -> dict[str, Any]:
    found = _copy(
        ledger, "optimizer", (),
        ("--adam-beta1=0.9", "--adam-beta2=0.999", "--adam-eps=1e-8", "--weight-decay=0.01", "--clip-grad=1.0"),
    )  # fmt: skip
    return {**found, **megatron_levers.optimizer(ledger), **megatron_muon.optimizer(ledger, tensor)}


def _train(ledger: Ledger) -> dict[str, Any]:
    if not ledger.has("--micro-batch-size"):
        ledger.problem("--micro-batch-size", expected="that the command gives it, as Megatron-LM requires")
    if ledger.has("--bf16") and ledger.has("--fp16"):
        ledger.problem("--bf16", "--fp16", expected="one of the two")
    found = _copy(ledger, "train", ("--micro-batch-size",))
    found["precision"] = "bf16" if ledger.has("--bf16") or ledger.has("--fp16") else "fp32"
    ledger.carry("--bf16", "train.precision")
    if steps := ledger.integer("--exit-interval"):
        found["stop_after_steps"] = steps
    ledger.carry("--exit-interval", "train.stop_after_steps")
    return {**found, **megatron_levers.train(ledger)}


def _checkpoint(ledger: Ledger) -> dict[str, Any]:
    found = {"every_steps": None, **_copy(ledger, "checkpoint", ("--save-interval",))}
    kept = ledger.text("--most-recent-k")
    if kept is not None and kept.isdecimal() and 0 < int(kept[:9]) < 10**6:
        found["keep"] = int(kept)
        ledger.carry("--most-recent-k", "checkpoint.keep")
        return found
    why, do = "2 checkpoints are kept, Megatron-LM keeps all", "raise checkpoint.keep, if you want more"
    ledger.lose("--most-recent-k", why, do)
    if not ledger.has("--most-recent-k"):
        ledger.lose_default("--most-recent-k", why, do)
    return {**found, "keep": 2}


def _evaluation(ledger: Ledger, stages: list[dict[str, Any]]) -> dict[str, Any]:
    found = {"every_steps": None, **_copy(ledger, "evaluation", ("--eval-interval",))}
    batches = ledger.integer("--eval-iters", 100) or 0
    size = stages[-1]["global_batch_size"]
    size = size if isinstance(size, int) else size[-1]["size"]
    if batches:
        found["sequences"] = batches * size
    else:
        found["every_steps"] = None
    ledger.carry("--eval-iters", "evaluation.sequences" if batches else "evaluation.every_steps: null")
    return found


def _logging(ledger: Ledger) -> dict[str, Any]:
    ledger.carry("--tensorboard-dir", "logging.tensorboard: events lie in RUN/tensorboard")
    wandb = megatron_layout.wandb(ledger)
    return {
        **({"wandb": wandb} if wandb else {}),
        **_copy(ledger, "logging", ("--log-interval=100",)),
        "tensorboard": ledger.has("--tensorboard-dir"),
    }


# ---- the rest --------------------------------------------------------------------------------------------


def _default_batch(ledger: Ledger, parallel: dict[str, Any], ranks: int | None) -> int | None:
    together = parallel["tensor"] * parallel["pipeline"] * parallel["context"]
    micro = ledger.integer("--micro-batch-size", 1, 1) or 1
    return micro * max(1, ranks // together) if ranks else None


def _ordered(stage: dict[str, Any]) -> dict[str, Any]:
    first = ("name", "tokens", "mixture", "global_batch_size", "learning_rate", "transforms")
    return {key: stage[key] for key in first if key in stage}


def _say_where_it_does_not_fit(ledger: Ledger, config: RunConfig, ranks: int | None) -> None:
    if ranks is None:
        return
    try:
        check_layout(config, ranks)
    except ConfigError as error:
        found = " ".join(str(error.found).split())
        ledger.lost.append(Entry(f"{ranks} ranks", 0, found, "start as many ranks as the layout needs"))


def _printable(line: str) -> str:
    return "".join(character if character.isprintable() else " " for character in line)


def read_command(path: Path) -> str:
    """The text of a script.

    Raises:
        ConfigError: There is none, or it is not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("There is no such script.", where=path, do="check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("The script cannot be read.", where=path, found=error) from None
