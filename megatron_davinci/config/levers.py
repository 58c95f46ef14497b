"""Levers that do not go together, or not with a layout: found before anything starts, all of them at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_davinci.config.low_precision import low_precision_problems
from megatron_davinci.config.snapshots import snapshot_problems

if TYPE_CHECKING:
    from megatron_davinci.config.run import RunConfig


def lever_problems(config: RunConfig) -> list[str]:
    """What of the levers contradicts itself, whatever the number of ranks; a line each."""
    return [
        *recompute_problems(config),
        *decay_problems(config),
        *overlap_problems(config),
        *optimizer_problems(config),
        *low_precision_problems(config),
        *graph_problems(config),
        *kernel_problems(config),
        *snapshot_problems(config),
        *task_problems(config),
    ]


def lever_needs(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """Levers that act on some platforms and layers only, as `platform.backends.choose_backends` takes them."""
    train, parallel = config.train, config.parallel
    low = train.low_precision
    engine = {
        "parallel.overlap_tensor": parallel.overlap_tensor,
        "train.low_precision.parameters": low.parameters,
    }
    ours = {
        "train.low_precision.tail_tokens": low.tail_tokens is not None,
        "train.low_precision.activations: fp8": low.activations == "fp8",
        "train.low_precision.keep_codes": low.keep_codes,
        "train.low_precision.nvfp4": low.nvfp4 != type(low.nvfp4)(),
        "kept layers under train.low_precision.recipe: delayed": low.recipe == "delayed"
        and low.keep_first_layers + low.keep_last_layers > 0,
        "model.norm_placement: post": config.model.norm_placement == "post",
        "model.qk_norm_scope: all_heads": config.model.qk_norm_scope == "all_heads",
    }
    return {
        "needs_engine": tuple(name for name, asked in engine.items() if asked),
        "needs_package": ("optimizer.cpu_offload",) if config.optimizer.cpu_offload else (),
        "needs_cuda": ("train.cuda_graphs",) if train.cuda_graphs else (),
        "needs_local": tuple(name for name, asked in ours.items() if asked),
        "needs_adam": ("optimizer.moments: fp8",) if config.optimizer.moments == "fp8" else (),
    }


def task_problems(config: RunConfig) -> list[str]:
    """What asking a model that is trained does not go with."""
    if not config.evaluation.tasks:
        return []
    parallel = config.parallel
    problems = [
        f"evaluation.tasks makes items of held-out texts, and {key} is not given"
        for key, given in (
            ("data.validation", config.data.validation),
            ("data.tokenizer", config.data.tokenizer),
        )
        if not given
    ]
    others = {
        "parallel.context": parallel.context > 1,
        "parallel.expert": parallel.expert > 1,
        "parallel.virtual_pipeline": parallel.virtual_pipeline > 1,
        "parallel.sequence: true": parallel.sequence,
        "parallel.overlap_parameter_gather: true": parallel.overlap_parameter_gather,
        "train.cuda_graphs: true": config.train.cuda_graphs,
    }
    if found := [name for name, asked in others.items() if asked]:
        problems.append(
            "evaluation.tasks asks under data, tensor and pipeline parallelism alone; found "
            f"{', '.join(found)}. `davinci eval RUN --follow` asks beside the run"
        )
    return problems


def overlap_problems(config: RunConfig) -> list[str]:
    """What overlap and sharding rest on."""
    parallel, problems = config.parallel, []
    sharded = parallel.distributed_optimizer
    if parallel.overlap_parameter_gather and not (sharded and parallel.overlap_gradient_reduce):
        problems.append(
            "parallel.overlap_parameter_gather needs distributed_optimizer: true, which shards what is gathered, and "
            "overlap_gradient_reduce: true"
        )
    if parallel.overlap_tensor and not parallel.sequence:
        problems.append("parallel.overlap_tensor needs sequence: true (and tensor >= 2)")
    if parallel.optimizer_instances > 1 and not sharded:
        problems.append(
            "parallel.optimizer_instances shards the optimizer's state; it needs distributed_optimizer: true"
        )
    if config.optimizer.cpu_offload:
        if not sharded:
            problems.append("optimizer.cpu_offload needs parallel.distributed_optimizer: true")
        if config.train.precision == "fp32":
            problems.append(
                "optimizer.cpu_offload keeps fp32 main weights of a bf16 run; found precision: fp32"
            )
    return problems


def optimizer_problems(config: RunConfig) -> list[str]:
    """What Muon, moments in 8 bits and our own AdamW rest on."""
    optimizer, whose, problems = config.optimizer, config.backends.optimizer, []
    low, parallel = config.train.low_precision, config.parallel
    if optimizer.kind == "muon":
        others = {
            f"backends.optimizer: auto or torch; found {whose}": whose not in ("auto", "torch"),
            "optimizer.moments: fp32; found fp8": optimizer.moments == "fp8",
            f"parallel.expert_tensor: 1; found {parallel.expert_tensor}": parallel.expert_tensor > 1,
            "optimizer.cpu_offload: 0": optimizer.cpu_offload > 0,
            "weights that are not kept in 8 bits; found train.low_precision.parameters": low.parameters,
            "parallel.overlap_parameter_gather: false; found true": parallel.overlap_parameter_gather,
            f"parallel.optimizer_instances: 1; found {parallel.optimizer_instances}": (
                parallel.optimizer_instances > 1
            ),
        }
        problems += [f"optimizer.kind: muon needs {needed}" for needed, lacking in others.items() if lacking]
    elif optimizer.muon != type(optimizer.muon)():
        problems.append("optimizer.muon says how optimizer.kind: muon does it; found kind: adamw")
    if optimizer.moments == "fp8":
        if whose not in ("auto", "davinci"):
            problems.append(
                f"optimizer.moments: fp8 is in backends.optimizer: davinci only; found optimizer: {whose}"
            )
        if not parallel.distributed_optimizer:
            problems.append("optimizer.moments: fp8 needs parallel.distributed_optimizer: true")
    if optimizer.cpu_offload and (whose == "davinci" or optimizer.moments == "fp8"):
        problems.append(
            "optimizer.cpu_offload has an AdamW of its own; not with backends.optimizer: davinci or moments: fp8"
        )
    return problems


def graph_problems(config: RunConfig) -> list[str]:
    """What changes from step to step cannot be captured."""
    if not config.train.cuda_graphs:
        return []
    problems = []
    if config.train.recompute.granularity == "full":
        problems.append(
            "train.cuda_graphs captures whole layers, and train.recompute.granularity: full runs them again"
        )
    if config.model.dropout:
        problems.append(
            "train.cuda_graphs cannot capture model.dropout, whose generators are seeded at every step"
        )
    if any(stage.transforms.document_mask for stage in config.curriculum) or config.evaluation.document_mask:
        problems.append(
            "train.cuda_graphs cannot capture a document mask, whose documents differ from step to step"
        )
    return problems


def kernel_problems(config: RunConfig) -> list[str]:
    """Where our ops are not in the place that they are asked for."""
    if config.backends.swiglu == "davinci" and config.model.experts is not None:
        return [
            "backends.swiglu: davinci is in MLPs, and model.experts has experts in their place: take megatron"
        ]
    return []


def decay_problems(config: RunConfig) -> list[str]:
    """Whether the matrices that are not to be decayed are there."""
    spared = config.optimizer.no_weight_decay
    problems = []
    if config.model.tie_embeddings and "output" in spared:
        problems.append(
            "optimizer.no_weight_decay names output, which is the embedding (model.tie_embeddings: true): "
            "write embedding"
        )
    if len(set(spared)) < len(spared):
        problems.append(f"optimizer.no_weight_decay names one twice: {', '.join(spared)}")
    return problems


def recompute_problems(config: RunConfig) -> list[str]:
    """Whether the layers of every model chunk can be recomputed as asked."""
    recompute, parallel = config.train.recompute, config.parallel
    here, other = ("mlp", "moe") if config.model.experts is None else ("moe", "mlp")
    if other in recompute.modules:
        return [f"train.recompute.modules names {other}, and the model's layers have none: write {here}"]
    if "layernorm" in recompute.modules and config.model.norm_placement == "post":
        return [
            "train.recompute.modules names layernorm, the norms before blocks: model.norm_placement is post"
        ]
    if recompute.granularity != "full":
        return []
    if parallel.pipeline_layers is None and config.model.num_layers % parallel.chunks:
        return []  # said by check_layout
    chunks = parallel.chunk_layers(config.model.num_layers)
    if recompute.layers > max(chunks):
        return [
            f"train.recompute.layers ({recompute.layers}) is more than any pipeline stage has ({max(chunks)})"
        ]
    uneven = sorted({layers for layers in chunks if layers % recompute.layers})
    if recompute.method == "uniform" and uneven:
        return [
            f"train.recompute.layers ({recompute.layers}) does not divide the layers of a pipeline stage "
            f"({', '.join(map(str, uneven))}): method uniform cuts them into equal runs"
        ]
    return []
