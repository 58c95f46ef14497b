"""What of a layout does not go: every number that does not divide, with the number."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_davinci.config.run import RunConfig


def layout_problems(config: RunConfig, world_size: int) -> list[str]:
    """All that keeps `config` from being laid over `world_size` ranks, a line each; none where it can be."""
    found = _Problems()
    _check_model(found, config)
    _check_experts(found, config)
    _check_ranks(found, config, world_size)
    return found.lines


def even_split(layers: int, chunks: int) -> list[int]:
    """Divide layers among model chunks as evenly as it goes.

    The last chunk, which has the output matrix and the loss too, and then the first, which has the embedding, are the
    last to get one more.
    """
    least, more = divmod(layers, chunks)
    order = [*range(1, chunks - 1), 0, chunks - 1]
    return [least + (chunk in order[:more]) for chunk in range(chunks)]


def listed(numbers: Sequence[int]) -> str:
    """Numbers as an override is written: `[1,2,1]`."""
    return "[" + ",".join(str(number) for number in numbers) + "]"


class _Problems:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def must_divide(self, number: int, by: int, what: str, unit: str, note: str = "") -> None:
        if number % by:
            self.lines.append(
                f"{what} ({number}) is not a multiple of {unit} ({by}): remainder {number % by}{note}"
            )


def _check_model(found: _Problems, config: RunConfig) -> None:
    model, parallel, length = config.model, config.parallel, config.data.sequence_length
    tensor, context = parallel.tensor, parallel.context
    if tensor > 1:
        t = "parallel.tensor"
        found.must_divide(model.num_attention_heads, tensor, "model.num_attention_heads", t)
        _check_groups(found, config)
        if model.experts is None:
            found.must_divide(model.ffn_hidden_size, tensor, "model.ffn_hidden_size", t)
        found.must_divide(model.vocab_size, tensor, "model.vocab_size", t)
    if context > 1:
        found.must_divide(length, 2 * context, "data.sequence_length", "2 * parallel.context")
        if parallel.sequence:
            unit = "parallel.context * parallel.tensor"
            found.must_divide(length, context * tensor, "data.sequence_length", unit)
    elif parallel.sequence:
        found.must_divide(length, tensor, "data.sequence_length", "parallel.tensor")
    if parallel.pipeline_layers is not None:
        found.lines += _chunk_problems(parallel.pipeline_layers, model.num_layers, parallel.chunks)
    else:
        unit = "parallel.pipeline" + (" * parallel.virtual_pipeline" if parallel.virtual_pipeline > 1 else "")
        found.must_divide(model.num_layers, parallel.chunks, "model.num_layers", unit)


def _check_groups(found: _Problems, config: RunConfig) -> None:
    """Megatron-Core shares a key/value head among several tensor ranks where all have the same number of them."""
    model, tensor = config.model, config.parallel.tensor
    groups = model.num_query_groups
    if model.qk_norm_scope == "all_heads" and groups % tensor:
        found.must_divide(
            groups,
            tensor,
            "model.num_query_groups",
            "parallel.tensor",
            "; a norm over all heads (model.qk_norm_scope) needs each key/value head on one tensor rank",
        )
        return
    if groups % tensor and tensor % groups:
        found.lines.append(
            f"model.num_query_groups ({groups}) is neither a multiple nor a divisor of parallel.tensor ({tensor})"
        )
    elif groups % tensor:
        rows = 2 * groups * model.kv_channels
        found.must_divide(rows, tensor, "2 * model.num_query_groups * head_dim", "parallel.tensor")


def _check_experts(found: _Problems, config: RunConfig) -> None:
    experts, parallel = config.model.experts, config.parallel
    if experts is None:
        for name in ("expert", "expert_tensor"):
            if getattr(parallel, name) > 1:
                found.lines.append(
                    f"parallel.{name} ({getattr(parallel, name)}) divides experts, and model.experts is null"
                )
        return
    found.must_divide(experts.number, parallel.expert, "model.experts.number", "parallel.expert")
    found.must_divide(
        config.model.ffn_hidden_size,
        parallel.expert_tensor,
        "model.ffn_hidden_size",
        "parallel.expert_tensor",
    )
    if experts.shared_ffn_hidden_size is not None:
        what = "model.experts.shared_ffn_hidden_size"
        found.must_divide(experts.shared_ffn_hidden_size, parallel.tensor, what, "parallel.tensor")
    if parallel.tensor > 1 and not parallel.sequence:
        found.lines.append(
            f"model.experts with parallel.tensor ({parallel.tensor}) needs parallel.sequence=true: else each tensor "
            "rank would route all tokens"
        )


def _check_ranks(found: _Problems, config: RunConfig, world_size: int) -> None:
    parallel, micro = config.parallel, config.train.micro_batch_size
    product = "parallel.tensor * parallel.pipeline" + (" * parallel.context" if parallel.context > 1 else "")
    together = parallel.tensor * parallel.pipeline * parallel.context
    found.must_divide(world_size, together, "the number of ranks", product)
    if parallel.expert * parallel.expert_tensor > 1:
        product = "parallel.expert * parallel.expert_tensor * parallel.pipeline"
        by = parallel.expert * parallel.expert_tensor * parallel.pipeline
        found.must_divide(world_size, by, "the number of ranks", product)
    if world_size % together:
        return
    copies = "the number of data- and context-parallel ranks"
    instances = "parallel.optimizer_instances"
    found.must_divide(
        world_size // together * parallel.context, parallel.optimizer_instances, copies, instances
    )
    if config.model.experts is not None:
        by = parallel.expert * parallel.expert_tensor * parallel.pipeline
        if world_size % by == 0:
            copies = "the number of ranks that have the same experts"
            found.must_divide(world_size // by, parallel.optimizer_instances, copies, instances)
    at_once = micro * (world_size // together)
    stages: dict[int, list[str]] = {}
    for stage in config.curriculum:
        for size in sorted({phase.size for phase in stage.global_batch_size}):
            stages.setdefault(size, []).append(stage.name)
    for size, names in stages.items():
        where = f"global_batch_size of stage{'s' if len(names) > 1 else ''} {', '.join(names)}"
        unit = f"train.micro_batch_size * data parallel ranks = {micro} * {world_size // together}"
        found.must_divide(size, at_once, where, unit)
        if parallel.virtual_pipeline > 1 and size % at_once == 0 and size // at_once < parallel.pipeline:
            found.lines.append(
                f"{where} ({size}) is {size // at_once} micro-batches on each rank: an interleaved pipeline needs at "
                f"least parallel.pipeline ({parallel.pipeline})"
            )


def _chunk_problems(split: list[int], layers: int, chunks: int) -> list[str]:
    problems = []
    if len(split) != chunks:
        problems.append(
            f"parallel.pipeline_layers has {len(split)} numbers, and parallel.pipeline * "
            f"parallel.virtual_pipeline is {chunks}"
        )
    if sum(split) != layers:
        problems.append(f"parallel.pipeline_layers adds up to {sum(split)}, and model.num_layers is {layers}")
    if 0 in split[1:-1]:
        problems.append(
            f"parallel.pipeline_layers ({listed(split)}) leaves a chunk between the first and the last "
            "without a layer"
        )
    return problems
