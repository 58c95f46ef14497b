"""What goes with the weights: a model card filled from the run, its curves, and a manifest of all that decided it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_davinci.config.model import ModelConfig
from megatron_davinci.convert.family import Family
from megatron_davinci.convert.origin import MANIFEST, digest_of
from megatron_davinci.files import file_digest, write_atomically, write_json
from megatron_davinci.report.numbers import number, percent, quantity
from megatron_davinci.report.plots import grid_png
from megatron_davinci.report.run_files import Evaluation, RunFiles, read_run
from megatron_davinci.report.run_metrics import Metrics, as_number
from megatron_davinci.report.run_plots import overview_plots
from megatron_davinci.report.run_story import RunStory
from megatron_davinci.version import __version__

CURVES, CARD = "curves.png", "README.md"


@dataclass(frozen=True)
class Release:
    """What a card is about.

    Attributes:
        family: What the weights are written as.
        model: The `model` section of the run's configuration.
        checkpoint: The checkpoint's manifest.
        dtype: Of the weights.
        run: The run directory; None for a checkpoint by itself.
        verification: `Verification.facts()`; None if it was skipped.
        verified: The same as a sentence.
        licence: An identifier such as `apache-2.0`; None if none was stated.
        tokenizer: Whether one goes along.
    """

    family: Family
    model: dict[str, Any]
    checkpoint: dict[str, Any]
    dtype: str
    run: Path | None
    verification: dict[str, Any] | None
    verified: str | None
    licence: str | None
    tokenizer: bool


def write_card(folder: Path, release: Release) -> None:
    """Write the card, the curves and the manifest into a folder of weights. The same run gives the same bytes.

    Args:
        folder: The folder.
        release: What it is about.
    """
    files = None if release.run is None else until(read_run(release.run), int(release.checkpoint["step"]))
    plots = overview_plots(RunStory(files)) if files is not None and len(files.metrics) else []
    if plots:
        write_atomically(folder / CURVES, grid_png(plots, columns=min(2, len(plots))))
    name = files.name if files is not None else release.family.name
    parts = [
        _front_matter(release),
        f"# {name}, step {release.checkpoint['step']:,}",
        _about(release),
        _architecture(release),
        _training(release, files) if files is not None else "",
        f"## Curves\n\n![Held-out loss, training loss, mixture, learning rate]({CURVES})" if plots else "",
        _evaluation(files) if files is not None else "",
        _use(release),
        _conversion(release),
        _licence(release),
    ]
    write_atomically(folder / CARD, "\n\n".join(part for part in parts if part) + "\n")
    write_json(folder / MANIFEST, _manifest(folder, release, files))


def until(files: RunFiles, step: int) -> RunFiles:
    """A run as it was after a step: what it did later is another checkpoint's."""
    kept = int(np.searchsorted(files.metrics.step, step, side="right"))
    metrics = files.metrics
    tokens = metrics["consumed_samples"][kept - 1] if kept else 0
    return replace(
        files,
        metrics=Metrics(
            metrics.step[:kept],
            metrics.stage[:kept],
            {name: column[:kept] for name, column in metrics.columns.items()},
            {name: column[:kept] for name, column in metrics.phases.items()},
            metrics.slowest,
            {name: column[:kept] for name, column in metrics.source_loss.items()},
        ),
        evaluations=[one for one in files.evaluations if one.step <= step],
        mixes=[one for one in files.mixes if one.first_sample < max(tokens, 1)],
        summary={},
        samples=[],
        proposals=[],
    )


def _front_matter(release: Release) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if release.licence:
        lines.append(f"license: {release.licence}")
    return "\n".join([*lines, "tags:", "- megatron-davinci", "- pretrained", "---"])


def _about(release: Release) -> str:
    tokens = release.checkpoint.get("consumed_tokens")
    rows = release.model["vocab_size"] - (release.model.get("vocab_padding") or 0)
    model = ModelConfig.model_validate(release.model | {"vocab_size": rows, "vocab_padding": 0})
    parameters = model.parameters()
    said = f"A base language model of {quantity(parameters)} parameters ({parameters:,})"
    if not tokens:
        return f"{said}, as megatron-davinci {__version__} has read it: it was not trained further."
    return (
        f"{said}, pretrained on {quantity(tokens)} tokens with megatron-davinci {__version__}. It was not tuned to "
        "follow instructions."
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in lines)


def _architecture(release: Release) -> str:
    model = release.model
    scaling = model.get("rope_scaling")
    rows = [
        ["Class", f"`{release.family.architecture}` of transformers"],
        ["Layers", str(model["num_layers"])],
        ["Hidden size", f"{model['hidden_size']:,}"],
        ["MLP (SwiGLU)", f"{model['ffn_hidden_size']:,}"],
        [
            "Attention",
            f"{model['num_attention_heads']} heads, {model['num_query_groups']} of keys and values, "
            f"{model['head_dim'] or model['hidden_size'] // model['num_attention_heads']} channels each"
            + (", biases on queries, keys and values" if model["qkv_bias"] else "")
            + (", queries and keys normalised" if model.get("qk_norm") else "")
            + (" over all heads together" if model.get("qk_norm_scope") == "all_heads" else ""),
        ],
        [
            "Norms",
            "RMSNorm "
            + ("behind" if model.get("norm_placement") == "post" else "before")
            + f" attention and MLP, epsilon {model['norm_epsilon']:g}",
        ],
        [
            "Positions",
            f"RoPE, base {model['rope_base']:g}"
            + (f", scaled ({scaling['kind']}, factor {scaling['factor']:g})" if scaling else ""),
        ],
        ["Vocabulary", f"{model['vocab_size'] - (model.get('vocab_padding') or 0):,}"],
        ["Embeddings", "tied" if model["tie_embeddings"] else "untied"],
        ["Longest sequence", f"{model['max_sequence_length']:,} tokens"],
        ["Weights", release.dtype],
    ]
    return "## Architecture\n\n" + _table(["", ""], rows)


def _training(release: Release, files: RunFiles) -> str:
    config = files.config
    optimizer, train = config.get("optimizer") or {}, config.get("train") or {}
    settings = [
        ["Sequence length", f"{files.sequence_length:,.0f} tokens"],
        ["Precision", str(release.checkpoint.get("precision") or train.get("precision"))],
        ["Optimizer", _optimizer(optimizer)],
        ["Steps", f"{release.checkpoint['step']:,}"],
        ["Tokens", f"{release.checkpoint.get('consumed_tokens', 0):,}"],
        ["Seed", str((config.get("run") or {}).get("seed"))],
    ]
    begun = (config.get("checkpoint") or {}).get("initial_weights")
    if begun:
        settings.append(["Began with", f"the weights of {Path(begun).name}"])
    if mean_of := (release.checkpoint.get("from") or {}).get("mean_of"):
        steps = ", ".join(f"{one['step']:,}" for one in mean_of)
        settings.append(["Weights", f"the mean of {len(mean_of)} checkpoints, of steps {steps}"])
    parts = ["## Training", _table(["", ""], settings)]
    stages = _stages([one for one in config.get("curriculum") or [] if isinstance(one, dict)])
    if stages:
        head = ["Stage", "Until, tokens of the run", "Sequences a step", "Learning rate", "Weight decay"]
        parts += ["### Stages", _table(head, stages)]
    mixture = _mixture(files)
    if mixture:
        parts += ["### Data mixture", mixture]
    return "\n\n".join(parts)


def _optimizer(said: dict[str, Any]) -> str:
    adamw = f"AdamW, beta1 {said.get('beta1')}, beta2 {said.get('beta2')}, epsilon {said.get('epsilon')}"
    # A setting that is younger than the run was AdamW.
    if said.get("kind", "adamw") == "muon":
        muon = said.get("muon") or {}
        adamw = f"Muon with momentum {muon.get('momentum')} for the layers' matrices; for all else {adamw}"
    clip = said.get("clip_grad_norm")
    clipped = f"gradients clipped to a norm of {clip}" if clip else "gradients not clipped"
    return f"{adamw}; weight decay {said.get('weight_decay')}, {clipped}"


def _stages(stages: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each. A stage's own tokens are added to those before it: it ends where their sum is reached."""
    rows, until = [], 0.0
    for stage in stages:
        until += as_number(stage.get("tokens"))
        rows.append(_stage(stage, until))
    return rows


def _stage(stage: dict[str, Any], until: float) -> list[str]:
    rate = stage.get("learning_rate") or {}
    batch = stage.get("global_batch_size")
    phases = batch if isinstance(batch, list) else [{"size": batch}]
    sizes = ", then ".join(str(one.get("size")) for one in phases)
    peak = f"{rate.get('shape', 'constant')}, {number_of(rate.get('peak'))}"
    end = rate.get("end")
    return [
        str(stage.get("name")),
        quantity(until) if np.isfinite(until) else "unknown",
        sizes,
        peak + (f" to {number_of(end)}" if end is not None else ""),
        "as the optimizer's" if stage.get("weight_decay") is None else str(stage["weight_decay"]),
    ]


def number_of(value: Any) -> str:
    """A setting as it is read."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _mixture(files: RunFiles) -> str:
    """What the journal says was drawn, from where on."""
    length = files.sequence_length
    sources = list(dict.fromkeys(name for mix in files.mixes for name in mix.weights))
    if not sources:
        return ""
    rows = []
    for name in sources:
        domain = files.domains.get(name, name)
        row = [name if domain == name else f"{name} ({domain})"]
        rows.append(row + [percent(mix.weights.get(name, 0.0)) for mix in files.mixes])
    head = ["Source"] + [
        f"{mix.stage}, from {quantity(mix.first_sample * length) if mix.first_sample else '0'} tokens"
        for mix in files.mixes
    ]
    return _table(head, rows)


def _evaluation(files: RunFiles) -> str:
    if not files.evaluations:
        return ""
    last: Evaluation = files.evaluations[-1]
    rows = [
        [
            domain,
            number(loss),
            number(last.bits_per_byte[domain]) if domain in last.bits_per_byte else "unknown",
        ]
        for domain, loss in last.heldout_loss.items()
    ]
    return f"## Evaluation\n\nHeld-out text, after step {last.step:,}.\n\n" + _table(
        ["Domain", "Nats a token", "Bits a byte"], rows
    )


def _use(release: Release) -> str:
    load = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
    ]
    if release.tokenizer:
        load += [
            'tokenizer = AutoTokenizer.from_pretrained("PATH")',
            'prompt = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)',
            "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))",
        ]
    else:
        load.insert(2, "# No tokenizer goes along: use the one that the model was trained with.")
        load[0] = "from transformers import AutoModelForCausalLM"
    return "## Use\n\n```python\n" + "\n".join(load) + "\n```\n\nNo code but that of transformers is needed."


def _conversion(release: Release) -> str:
    said = (
        f"Verified: {release.verified}." if release.verified else "**Not verified**: the check was skipped."
    )
    return f"## Conversion\n\nFrom a Megatron-Core checkpoint of step {release.checkpoint['step']:,}. {said}"


def _licence(release: Release) -> str:
    return "## Licence\n\n" + (release.licence or "None was stated when this card was written.")


def _manifest(folder: Path, release: Release, files: RunFiles | None) -> dict[str, Any]:
    weights = sorted(
        path for path in folder.iterdir() if path.is_file() and path.name not in (MANIFEST, "conversion.json")
    )
    run: dict[str, Any] = {}
    if files is not None:
        manifest = files.manifest
        kept = ("name", "seed", "sequence_length", "data_fingerprints", "packages", "davinci_version")
        run = {key: manifest[key] for key in kept if key in manifest}
        run["config"] = without_places(files.config)
        run["mixture"] = [
            {"first_sample": mix.first_sample, "stage": mix.stage, "weights": mix.weights}
            for mix in files.mixes
        ]
        run["evaluations"] = [
            {
                "step": one.step,
                "consumed_tokens": one.consumed_tokens,
                "heldout_loss": one.heldout_loss,
                "heldout_bits_per_byte": one.bits_per_byte,
            }
            for one in files.evaluations
        ]
    checkpoint = {
        key: release.checkpoint.get(key)
        for key in ("step", "consumed_samples", "consumed_tokens", "precision", "layout")
    }
    return {
        "format": 1,
        "family": release.family.name,
        "model": release.model,
        "checkpoint": {**checkpoint, "sha256": digest_of(release.checkpoint)},
        "verification": release.verification,
        "run": run,
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in weights},
    }


def without_places(value: Any) -> Any:
    """Settings with absolute paths cut to their last part: where files lay on the machine is nobody's business."""
    if isinstance(value, dict):
        return {key: without_places(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_places(one) for one in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return Path(value).name
    return value
