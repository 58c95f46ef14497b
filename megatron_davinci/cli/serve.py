"""`davinci serve`: a checkpoint or an export behind the part of OpenAI's API that asks for text."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_davinci.cli.model_options import add_model_options, check_bounds
from megatron_davinci.errors import ConfigError

if TYPE_CHECKING:
    from megatron_davinci.evaluate.serving.writers import Writer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "model",
        help="run directory, RUN@STEP, a checkpoint's folder, or a folder of Hugging Face's form, as an export is",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="how to compute it, such as train.threads=2"
    )
    parser.add_argument("--port", type=int, default=8000, help="to listen at (default: 8000; 0: a free one)")
    parser.add_argument("--host", default="127.0.0.1", help="to listen at (default: 127.0.0.1, this machine)")
    parser.add_argument(
        "--name", help="of the model, as clients call it (default: the folder's, with the step)"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=16,
        metavar="N",
        help="texts written at once (default: 16); with 1 the same question always has the same answer",
    )
    parser.add_argument(
        "--waiting", type=int, default=256, metavar="N", help="texts that wait at most (default: 256)"
    )
    parser.add_argument(
        "--key-variable", metavar="NAME", help="environment variable with the API key that clients must show"
    )
    add_model_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Load the model and serve it until a signal."""
    check_bounds(arguments, {"port": (0, 65535), "batch": (1, 4096), "waiting": (1, 1 << 20)})
    key = _key(arguments.key_variable)
    with loaded(arguments) as (writer, name):
        from megatron_davinci.evaluate.serving.server import Server, Settings

        settings = Settings(
            arguments.name or name,
            arguments.host,
            arguments.port,
            arguments.batch,
            arguments.waiting,
            key=key,
        )
        server = Server(writer, settings)
        before = {
            number: signal.signal(number, lambda *_: server.stop())
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            print(
                f"{settings.name}: {server.url}, {writer.longest:,} tokens of context; Ctrl-C ends it",
                flush=True,
            )
            server.run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return 0


@contextmanager
def loaded(arguments: argparse.Namespace) -> Iterator[tuple[Writer, str]]:
    """The model, and what it is called where nobody says."""
    folder = Path(arguments.model)
    if (folder / "config.json").is_file():
        yield _folder_writer(arguments, folder), folder.absolute().name
        return
    from megatron_davinci.cli.convert_to_hf import find
    from megatron_davinci.cli.eval_model import config_of, on_ranks, tokenizer_for
    from megatron_davinci.evaluate.serving.writers import CheckpointWriter

    found = find(arguments.model)
    config = config_of(found.checkpoint.manifest["model"], arguments.overrides)
    if config.parallel.model_ranks > 1:
        raise ConfigError(
            "A server has one rank.",
            where="parallel",
            found=f"{config.parallel.model_ranks} ranks",
            do="serve an export of it by vLLM or SGLang, which spread a model over several GPUs",
        )
    tokenizer = tokenizer_for(found, arguments.tokenizer)
    with on_ranks(found, arguments.overrides, tokenizer, 1, arguments.tokens_at_once) as measured:
        name = found.run.absolute().name if found.run is not None else found.checkpoint.folder.name
        name = f"{name}@{found.checkpoint.step}" if found.run is not None else name
        yield CheckpointWriter(measured.engine, tokenizer, measured.identity["length"]), name


def _folder_writer(arguments: argparse.Namespace, folder: Path) -> Any:
    import torch

    from megatron_davinci.cli.eval_model import config_of
    from megatron_davinci.evaluate.serving.writers import FolderWriter
    from megatron_davinci.platform.device import choose

    if arguments.tokenizer is not None:
        raise ConfigError(
            "A folder of Hugging Face's form has its own tokenizer.", where="--tokenizer", do="leave it out"
        )
    config = config_of({"preset": "tiny"}, arguments.overrides)
    platform = choose(config.parallel.device, config.train.threads)
    precision = platform.precision(config.train.precision)
    return FolderWriter(folder, platform.device, torch.bfloat16 if precision == "bf16" else torch.float32)


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            "There is no API key in the environment.",
            where=variable,
            found="nothing",
            do=f"export {variable}=...",
        )
    return key
