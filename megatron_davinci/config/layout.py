"""Does the layout divide? All that does not, said at once, with the numbers."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_davinci.config.run import RunConfig
from megatron_davinci.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis."""

    world: int
    tensor: int
    pipeline: int
    data: int
    context: int = 1
    virtual_pipeline: int = 1

    def __str__(self) -> str:
        virtual = f" x VP{self.virtual_pipeline}" if self.virtual_pipeline > 1 else ""
        context = f" x CP{self.context}" if self.context > 1 else ""
        return f"TP{self.tensor} x PP{self.pipeline}{virtual}{context} x DP{self.data} = {self.world} ranks"


def check_layout(config: RunConfig, world_size: int) -> Layout:
    """Lay `config` over `world_size` ranks.

    Raises:
        ConfigError: Numbers that do not divide; the message lists every one of them.
    """
    if world_size < 1:
        raise ConfigError(
            "A run needs at least one rank.", where="ranks", found=world_size, expected="1 or more"
        )
    model, parallel, micro = config.model, config.parallel, config.train.micro_batch_size
    tensor, pipeline, context = parallel.tensor, parallel.pipeline, parallel.context
    problems: list[str] = []

    def must_divide(number: int, by: int, what: str, unit: str) -> None:
        if number % by:
            problems.append(f"{what} ({number}) is not a multiple of {unit} ({by}): remainder {number % by}")

    if tensor > 1:
        t = "parallel.tensor"
        must_divide(model.num_attention_heads, tensor, "model.num_attention_heads", t)
        must_divide(model.num_query_groups, tensor, "model.num_query_groups", t)
        must_divide(model.ffn_hidden_size, tensor, "model.ffn_hidden_size", t)
        must_divide(model.vocab_size, tensor, "model.vocab_size", t)
    if context > 1:
        length = config.data.sequence_length
        must_divide(length, 2 * context, "data.sequence_length", "2 * parallel.context")
        if parallel.sequence:
            must_divide(
                length, context * tensor, "data.sequence_length", "parallel.context * parallel.tensor"
            )
    elif parallel.sequence:
        must_divide(config.data.sequence_length, tensor, "data.sequence_length", "parallel.tensor")
    if parallel.pipeline_layers is not None:
        problems += _chunk_problems(parallel.pipeline_layers, model.num_layers, parallel.chunks)
    elif model.num_layers % parallel.chunks:
        unit = "parallel.pipeline" + (" * parallel.virtual_pipeline" if parallel.virtual_pipeline > 1 else "")
        split = even_split(model.num_layers, parallel.chunks)
        must_divide(model.num_layers, parallel.chunks, "model.num_layers", unit)
        if min(split[1:-1], default=1):
            problems[-1] += f"; an uneven split is parallel.pipeline_layers={_listed(split)}"
    together = parallel.model_ranks
    product = "parallel.tensor * parallel.pipeline" + (" * parallel.context" if context > 1 else "")
    must_divide(world_size, together, "the number of ranks", product)
    data = max(1, world_size // together)
    if world_size % together == 0:
        stages: dict[int, list[str]] = {}
        for stage in config.curriculum:
            for size in sorted({phase.size for phase in stage.global_batch_size}):
                stages.setdefault(size, []).append(stage.name)
        for size, names in stages.items():
            must_divide(
                size,
                micro * data,
                f"global_batch_size of {_stages(names)}",
                f"train.micro_batch_size * data parallel ranks = {micro} * {data}",
            )
            if (
                parallel.virtual_pipeline > 1
                and size % (micro * data) == 0
                and size // (micro * data) < pipeline
            ):
                problems.append(
                    f"global_batch_size ({size}) of {_stages(names)} is {size // (micro * data)} micro-batches on "
                    f"each rank: an interleaved pipeline needs at least parallel.pipeline ({pipeline})"
                )
    if problems:
        raise ConfigError(
            "The layout is impossible.",
            where=f"parallel, on {world_size} rank{'s' if world_size > 1 else ''}",
            found="\n".join(problems),
            expected="every one of these divisions without a remainder",
            do="change the layout, the number of ranks, or the size that is named",
        )
    return Layout(world_size, tensor, pipeline, data, context, parallel.virtual_pipeline)


def even_split(layers: int, chunks: int) -> list[int]:
    """Divide layers among model chunks as evenly as it goes.

    The last chunk, which has the output matrix and the loss too, and then the first, which has the embedding, are the
    last to get one more.
    """
    least, more = divmod(layers, chunks)
    order = [*range(1, chunks - 1), 0, chunks - 1]
    return [least + (chunk in order[:more]) for chunk in range(chunks)]


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
            f"parallel.pipeline_layers ({_listed(split)}) leaves a chunk between the first and the last "
            "without a layer"
        )
    return problems


def _listed(numbers: list[int]) -> str:
    return "[" + ",".join(str(number) for number in numbers) + "]"


def _stages(names: list[str]) -> str:
    return f"stage{'s' if len(names) > 1 else ''} {', '.join(names)}"
