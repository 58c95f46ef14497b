"""Run directories that look like real ones: the four sub-stages of the recipe on a model of a laptop's size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

SEQUENCE_LENGTH = 512
DOMAINS = {"cc": "general", "github": "code", "math_web": "science", "papers": "science", "sft": "QA"}
# (stage, share of the steps, batch, learning rate from and to, weights of the sources)
STAGES: tuple[tuple[str, float, int, tuple[float, float], dict[str, str]], ...] = (
    ("1-1", 0.45, 16, (3e-4, 3e-4), {"cc": "0.682", "github": "0.0953", "math_web": "0.2227"}),
    (
        "1-2",
        0.27,
        32,
        (3e-4, 3e-5),
        {"cc": "0.5542", "github": "0.1166", "math_web": "0.2", "papers": "0.1292"},
    ),
    ("2-1", 0.14, 32, (3e-5, 3e-5), {"cc": "0.1", "github": "0.3", "papers": "0.3", "sft": "0.3"}),
    ("2-2", 0.14, 32, (3e-5, 3e-5), {"cc": "0.1884", "github": "0.0261", "papers": "0.0855", "sft": "0.7"}),
)
PHASES = {
    "data": 0.01,
    "forward": 0.29,
    "backward": 0.55,
    "gradient_sync": 0.06,
    "optimizer": 0.07,
    "other": 0.02,
}
RANKS = {
    "forward": {"least": 0.1, "most": 0.14, "rank": 1},
    "gradient_sync": {"least": 0.01, "most": 0.05, "rank": 0},
}
FLOOR = {"general": 3.62, "code": 1.94, "science": 2.91, "QA": 2.42}
BIGRAM = {"general": 5.71, "code": 4.38, "science": 5.33, "QA": 4.92}


def write_fake_run(
    folder: Path,
    *,
    steps: int = 4000,
    evaluations: int = 40,
    finished: bool = True,
    name: str = "laptop-curriculum",
) -> Path:
    """A run directory with `steps` steps through four stages; every file of the contract is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(7)
    metrics: list[dict[str, Any]] = []
    evals: list[dict[str, Any]] = []
    journal: list[dict[str, Any]] = []
    level = dict.fromkeys(FLOOR, 9.2)
    samples = step = 0
    for stage, share, batch, (start, end), weights in STAGES:
        mixture: dict[str, float] = dict.fromkeys(FLOOR, 0.0)
        for source, weight in weights.items():
            mixture[DOMAINS[source]] += float(weight)
        length = max(1, round(share * steps))
        journal.append({"kind": "mix", "first_sample": samples, "stage": stage, "weights": weights})
        for i in range(length):
            if step >= steps:
                break
            step += 1
            ramp = min(1.0, step / max(1, 0.03 * steps))
            size = batch // 2 if stage == "1-1" and i < length // 4 else batch
            samples += size
            progress = i / max(1, length - 1)
            rate = end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress)) if start != end else start
            for domain in level:
                pace = (0.2 + mixture[domain]) * 12 / steps * (1.6 if stage[0] == "2" else 1.0)
                level[domain] += (FLOOR[domain] - level[domain]) * min(0.5, pace)
            loss = sum(mixture[d] * level[d] for d in level) + random.normal(0, 0.06)
            seconds = size * SEQUENCE_LENGTH / (21_500 * (1 + random.normal(0, 0.02)))
            if random.random() < 0.004:
                seconds *= 2.2
            metrics.append(
                {
                    "step": step,
                    "stage": stage,
                    "consumed_samples": samples,
                    "consumed_tokens": samples * SEQUENCE_LENGTH,
                    "loss": loss + (1.6 if step == int(0.33 * steps) else 0.0),
                    "grad_norm": float(
                        np.exp(random.normal(-0.4, 0.22)) * (1 + 3 * math.exp(-step / (0.01 * steps)))
                    ),
                    "learning_rate": rate * ramp,
                    "global_batch_size": size,
                    "tokens_per_second": size * SEQUENCE_LENGTH / seconds,
                    "seconds": seconds,
                    "flops_utilization": 0.41 + random.normal(0, 0.01),
                    "sources": {
                        source: {"loss": level[DOMAINS[source]], "tokens": 512, "weight": 512, "epoch": 0.5}
                        for number, source in enumerate(weights)
                        if (step + number) % 3
                    },
                    "phases": phases_of(step, seconds),
                    **({"phases_by_rank": RANKS} if step % 10 == 0 else {}),
                }
            )
            if evaluations and (step % max(1, steps // evaluations) == 0 or step == steps):
                evals.append(
                    {
                        "step": step,
                        "consumed_tokens": samples * SEQUENCE_LENGTH,
                        "stage": stage,
                        "heldout_loss": {d: v + random.normal(0, 0.008) for d, v in level.items()},
                        "heldout_tokens": dict.fromkeys(level, 65536),
                        "heldout_bits_per_byte": {d: v / 4 / 0.6931 for d, v in level.items() if d != "qa"},
                    }
                )
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "evals.jsonl", evals)
    write_lines(folder / "journal.jsonl", journal)
    (folder / "domains.json").write_text(json.dumps(DOMAINS))
    (folder / "config.yaml").write_text(f"name: {name!r}\ndata:\n  sequence_length: {SEQUENCE_LENGTH}\n")
    (folder / "manifest.json").write_text(
        json.dumps(
            {
                "name": name,
                "created": "2025-06-01T10:00:00Z",
                "davinci_version": "0.1.0",
                "packages": {"torch": "2.11.0", "megatron-core": "0.16.1", "numpy": "2.4.6"},
                "platform": {"device": "cpu", "ranks": 2, "layout": {"tensor": 1, "pipeline": 1, "data": 2}},
                "model": {
                    "parameters": 6_291_968,
                    "num_layers": 6,
                    "hidden_size": 256,
                    "num_attention_heads": 4,
                },
                "data_fingerprints": {
                    source: f"sha256:{index:064x}" for index, source in enumerate(DOMAINS, 11)
                },
                "seed": 1234,
            }
        )
    )
    (folder / "samples.json").write_text(
        json.dumps(
            [
                {
                    "prompt": "def fibonacci(n):\n    ",
                    "text": "if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
                    "domain": "code",
                },
                {
                    "prompt": "The boiling point of water",
                    "text": " depends on the pressure of the air above it. At the top of a mountain the water "
                    "boils at a lower temperature, and so the same egg takes longer to cook than at the sea.",
                    "domain": "science",
                },
            ]
        )
    )
    if finished and metrics:
        (folder / "summary.json").write_text(
            json.dumps(
                {
                    "heldout_loss": evals[-1]["heldout_loss"] if evals else {},
                    "bigram_loss": BIGRAM,
                    "tokens": metrics[-1]["consumed_tokens"],
                    "seconds": sum(line["seconds"] for line in metrics),
                }
            )
        )
    return folder


def phases_of(step: int, seconds: float) -> dict[str, float]:
    """Where a step's time went; every 500th comes after a checkpoint."""
    phases = {name: share * seconds for name, share in PHASES.items()}
    return {**phases, "checkpoint": 2.0} if step % 500 == 1 and step > 1 else phases


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
