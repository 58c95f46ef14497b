"""What `data_order.py` measures in fresh processes: from nothing to the tokens of the first sample.

Run as `data_order_start.py ours|megatron SPECIFICATION`, the specification in JSON; prints what it measured in JSON.
Nothing but the standard library is imported before the clock starts.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> None:
    """Measure one start."""
    who, specification = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps({"ours": ours, "megatron": megatron}[who](specification)))


class Start:
    """Seconds and memory of a start, with the imports and without."""

    def __init__(self) -> None:
        self._floor = _megabytes("VmRSS")
        self._begin = time.perf_counter()

    def imported(self) -> None:
        """The imports are over."""
        self._imported = time.perf_counter()
        self._import_peak, self._import_floor = _megabytes("VmHWM"), _megabytes("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM starts anew from what is resident now

    def done(self, first_token: int) -> dict[str, Any]:
        """The first sample is there."""
        end, peak = time.perf_counter(), _megabytes("VmHWM")
        return {
            "seconds": end - self._begin,
            "seconds_without_imports": end - self._imported,
            "rss_mb": max(peak, self._import_peak) - self._floor,
            "rss_mb_without_imports": peak - self._import_floor,
            "process_mb": max(peak, self._import_peak),
            "first_token": first_token,
        }


def ours(specification: dict[str, Any]) -> dict[str, Any]:
    """Open the sources, build the curriculum, read sample `specification["sample"]`."""
    start = Start()
    from megatron_davinci.data import Batches, Curriculum, MixRecord, Source

    start.imported()
    sources = {
        name: Source.open(name, path, specification["length"], vocab_size=specification["vocabulary"])
        for name, path in specification["sources"].items()
    }
    windows = {name: source.num_windows for name, source in sources.items()}
    records = [MixRecord(*record) for record in specification["records"]]
    curriculum = Curriculum(windows, specification["seed"], records)
    tokens = Batches(curriculum, sources).read([specification["sample"]]).tokens
    return start.done(int(tokens[0, -1]))


def megatron(specification: dict[str, Any]) -> dict[str, Any]:
    """Build Megatron-Core's `GPTDataset` of one source through its builder, read its first sample."""
    start = Start()
    from megatron_davinci.platform.device import choose

    choose("cpu")  # imports Megatron-Core where there is no GPU
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    start.imported()

    class Tokenizer:
        """What `GPTDataset` wants to know of a tokenizer."""

        vocab_size, eod, pad = specification["vocabulary"], 0, 0
        unique_identifiers: dict[str, str] = {"class": "benchmark"}  # noqa: RUF012

    config = GPTDatasetConfig(
        random_seed=specification["seed"],
        sequence_length=specification["length"],
        blend=([specification["prefix"]], None),
        split="1,0,0",
        path_to_cache=specification["cache"],
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [specification["samples"], 0, 0]
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]
    return start.done(int(dataset[0]["tokens"][-1]))


def _megabytes(field: str) -> float:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
