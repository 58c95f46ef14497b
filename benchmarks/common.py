"""What every benchmark shares: its options, the machine's description, the JSON that it writes."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import time
from pathlib import Path
from typing import Any


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark takes."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    made.add_argument("--seed", type=int, default=0)
    return made


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    described: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name(0)
    return described


def write(path: Path | None, figures: dict[str, float], peer: dict[str, Any]) -> None:
    """Print the figures, and write them when a file was asked for."""
    width = max([26, *map(len, figures)]) + 2
    for name, value in figures.items():
        print(f"{name:<{width}}{value:.6g}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "figures": figures,
            "peer": peer,
            "machine": machine(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }
        path.write_text(json.dumps(content, indent=2) + "\n")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to whoever asks for any.

    One of those may be given away before a rank listens on it.
    """
    for port in random.SystemRandom().sample(range(10_000, 30_000), 100):
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port found among a hundred from 10000 to 30000")


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher on this machine sets for one of its ranks."""
    return {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
