"""What a run says of itself before its first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_davinci.config import Layout, RunConfig
from megatron_davinci.kernels.ways import way_for
from megatron_davinci.platform.backends import choose_backends
from megatron_davinci.platform.device import Platform
from megatron_davinci.train.checkpoint_files import Checkpoint
from megatron_davinci.train.order import DataOrder


def introduction(
    config: RunConfig,
    platform: Platform,
    layout: Layout,
    order: DataOrder,
    clock: tuple[int, int, int],
    begins_with: Checkpoint | None,
    passed_over: Sequence[str],
) -> Iterator[str]:
    """Lines for whoever watches.

    Args:
        config: The run configuration.
        platform: What the run computes on.
        layout: Its layout.
        order: Its data order.
        clock: The step that it goes on after, the samples consumed by then, and the step that it ends at.
        begins_with: The checkpoint whose weights it begins with; None without one.
        passed_over: What was wrong with checkpoints that it does not go on from.
    """
    step, consumed_samples, last_step = clock
    if begins_with is not None:
        yield f"Beginning with the weights of {begins_with.folder}."
    for problem in passed_over:
        yield f"A checkpoint was passed over. {problem}"
    tokens = order.schedule.total_samples * config.data.sequence_length
    yield (
        f"{config.model.parameters():,} parameters, {tokens:,} tokens in {order.schedule.total_steps:,} steps, "
        f"{layout}, {platform.describe()}, {config.train.precision}"
    )
    backends = choose_backends(on_cuda=platform.name == "cuda", **config.backend_arguments())
    yield f"Backends: {backends}"
    if backends.own_kernels:
        yield f"Kernels: {way_for(platform.device)}"
    if config.train.cuda_graphs:
        yield (
            "CUDA graphs: not yet confirmed on a GPU since a fault of Megatron-Core's was mended; hold the first "
            "losses against a run without"
        )
    for cut in order.schedule.cut_rates():
        yield f"Warning: {cut}"
    for skip in order.journal.skips:
        if skip.to_sample > consumed_samples:
            yield f"Steps with samples {skip.from_sample:,} to {skip.to_sample - 1:,} are left out: {skip.reason}"
    if step >= last_step:
        yield f"Nothing is left to do: step {step} of {last_step} is done."
    elif step:
        yield f"Going on after step {step} ({consumed_samples:,} samples)."
