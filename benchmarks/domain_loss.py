"""What the training loss by source costs a step.

Steps that add up each row's loss by its source, and make the record of ten sources, against steps that sum a
micro-batch's loss as a whole, in turn, on one model of 4M parameters. A larger model takes longer for the same sums.

figures: overhead_fraction (median over pairs of with / without - 1), overhead_low, overhead_high (95%)
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import common
import paired

MICRO_BATCHES, SOURCES = 4, 10


def main() -> None:
    """Measure and report."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to measure")
    arguments = parser.parse_args()
    from megatron_davinci.platform import distributed

    with tempfile.TemporaryDirectory() as folder:
        stepper, platform, tokens, _ = paired.stepper_of(
            Path(folder), arguments.device, arguments.seed, MICRO_BATCHES
        )
        import torch

        from megatron_davinci.data.curriculum import Curriculum
        from megatron_davinci.data.journal import MixRecord
        from megatron_davinci.train import step as step_module
        from megatron_davinci.train.source_losses import source_records

        names = [f"source-{number}" for number in range(SOURCES)]
        record = MixRecord(first_sample=0, stage="all", weights=dict.fromkeys(names, "0.1"))
        curriculum = Curriculum(dict.fromkeys(names, 100_000), arguments.seed, [record])
        batch, by_row = len(tokens), step_module._loss
        state = {"n": 0}

        def with_it() -> None:
            first = state["n"]
            state["n"] += batch
            places = curriculum.locate_many(range(first, first + batch)).source
            source = torch.from_numpy(places).to(platform.device, non_blocking=True)
            result = stepper.train(tokens, MICRO_BATCHES, source=source, sources=SOURCES)
            source_records(curriculum, first, batch, paired.LENGTH, result.sources)
            platform.synchronize()

        def without() -> None:
            step_module._loss = as_a_whole
            stepper.train(tokens, MICRO_BATCHES)
            step_module._loss = by_row
            platform.synchronize()

        found = paired.figures(*paired.measure(without, with_it, arguments.seconds), arguments.seed)
        distributed.stop()
    common.write(arguments.json, found, {"name": "the same steps with one sum a micro-batch"})


def as_a_whole(losses: Any, loss_mask: Any) -> Any:
    """The loss as it would be without sources: one sum and one count a micro-batch."""
    import torch

    assert loss_mask is None
    total = losses.float().sum()
    count = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    report = torch.stack([total.detach().double(), count.double(), torch.zeros_like(count).double()])
    return total, count, report[None]


if __name__ == "__main__":
    main()
