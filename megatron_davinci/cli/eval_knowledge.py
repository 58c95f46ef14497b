"""`davinci eval RUN --knowledge DIR`: what a checkpoint knows of the texts that `davinci data knowledge` has made."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from megatron_davinci.errors import ConfigError

if TYPE_CHECKING:
    from megatron_davinci.cli.convert_to_hf import Found
    from megatron_davinci.evaluate.tasks import TaskResult


def check(arguments: argparse.Namespace) -> None:
    """Refuse texts without a suite that asks for them, and the suite without texts; read what was made.

    Raises:
        ConfigError: The options do not fit.
        DataError: The folder is none that `davinci data knowledge` has made.
    """
    from megatron_davinci.data.knowledge.corpus import read

    if arguments.knowledge is None:
        if arguments.suite == "knowledge":
            raise ConfigError(
                "The suite needs to know what was made.",
                where="--suite knowledge",
                do="name the folder that `davinci data knowledge` has made: --knowledge DIR",
            )
        return
    if arguments.suite not in ("knowledge", "local"):
        raise ConfigError(
            "Only two suites ask for made-up knowledge.",
            where=f"--knowledge {arguments.knowledge}",
            expected="--suite knowledge or --suite local",
        )
    read(arguments.knowledge)


def probe_knowledge(arguments: argparse.Namespace, found: Found, lm: Any) -> list[TaskResult]:
    """Ask everything that was made; nothing without --knowledge."""
    if arguments.knowledge is None:
        return []
    from megatron_davinci.config.model import ModelConfig
    from megatron_davinci.data.knowledge.corpus import read
    from megatron_davinci.evaluate.knowledge import probe

    parameters = ModelConfig.model_validate(found.checkpoint.manifest["model"]).parameters()
    return probe(read(arguments.knowledge), lm.ask, parameters, arguments.limit)
