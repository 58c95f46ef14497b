"""What timing the phases of a step costs it.

Steps with the timers attached (Megatron-Core's calls, the sums, the record's dictionary) and without them, in turn,
on one model of 4M parameters with steps of a fraction of a second: a larger step has the same calls a micro-batch and
takes longer for them, so that this is the dear end.

figures: overhead_fraction (median over pairs of with / without - 1), overhead_low, overhead_high (95%),
own_seconds_a_step (the timers' calls of a step alone, without a model), own_fraction (of such a step)
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import common
import paired

MICRO_BATCHES = 4


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
        from megatron_davinci.platform.stopwatch import stopwatch
        from megatron_davinci.train.phases import PhaseTimers

        on, off = PhaseTimers(stopwatch(platform)), PhaseTimers(None)

        def step(timers: Any) -> None:
            stepper.timers = timers
            attached = timers if timers.on else None
            for chunk in stepper.wrapped:
                chunk.config.timers = attached
            stepper.optimizer.config.timers = attached
            stepper.train(tokens, MICRO_BATCHES)
            platform.synchronize()
            timers.end_step()
            [{name: round(value, 6) for name, value in one.items()} for one in timers.finished()]

        without, with_it = paired.measure(lambda: step(off), lambda: step(on), arguments.seconds)
        found = paired.figures(without, with_it, arguments.seed)
        own = own_seconds(on)
        distributed.stop()
    found |= {"own_seconds_a_step": own, "own_fraction": own / found["seconds_a_step"]}
    common.write(arguments.json, found, {"name": "the same steps without timers"})


def own_seconds(timers: Any, steps: int = 2000) -> float:
    """The calls of a step, without what they time."""
    inside = ("optimizer-copy-to-main-grad", "optimizer-clip-main-grad", "optimizer-inner-step")
    sync = ("all-grads-sync", "non-tensor-parallel-grads-all-reduce", "embedding-grads-all-reduce")
    begin = time.perf_counter()
    for _ in range(steps):
        with timers.phase("data"):
            pass
        with timers.phase("optimizer"):
            pass
        for name in ("forward-compute", "backward-compute") * MICRO_BATCHES:
            timers(name, log_level=2).start()
            timers(name).stop()
        for name in sync:
            timers(name, log_level=1).start(barrier=True)
            timers(name).stop()
        with timers.phase("optimizer"):
            for name in (*inside, "params-all-gather"):
                timers(name, log_level=1).start(barrier=True)
                timers(name).stop()
        timers.end_step()
        [{name: round(value, 6) for name, value in one.items()} for one in timers.finished()]
    return (time.perf_counter() - begin) / steps


if __name__ == "__main__":
    main()
