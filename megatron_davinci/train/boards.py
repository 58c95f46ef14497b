"""Where curves are watched while a run goes on: TensorBoard's event files, and Weights & Biases."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_davinci.config import RunConfig
from megatron_davinci.config.training import WandbConfig
from megatron_davinci.errors import DataError, EnvironmentProblem
from megatron_davinci.files import write_json


class Board(Protocol):
    """Takes numbers by name."""

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show what a step measured."""
        ...

    def close(self) -> None:
        """Write what is buffered."""
        ...


class TensorBoard:
    """Event files.

    Args:
        folder: Where they go.
        first_step: The first step of this start; what an earlier start wrote from there on is hidden.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """See `Board.add`."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Board.close`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases: the same one at every start, by the id in `wandb.json` of the run directory.

    Steps that are taken again after a checkpoint are sent again, over the axis `step`; they are the same numbers.

    Args:
        run_directory: Holds `wandb.json`, and wandb's own files in `wandb/`.
        settings: Project, name, mode.
        config: Shown as the run's configuration.

    Raises:
        EnvironmentProblem: wandb is not installed, or did not start.
        DataError: `wandb.json` is not what was written.
    """

    def __init__(self, run_directory: Path, settings: WandbConfig, config: RunConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise EnvironmentProblem(
                "Weights & Biases was asked for and is not installed.",
                where="logging.wandb",
                found=error,
                do="pip install 'megatron-davinci[wandb]', or leave logging.wandb out",
            ) from error
        run_directory.mkdir(parents=True, exist_ok=True)
        try:
            self._run: Any = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=settings.name or run_directory.name,
                group=settings.group,
                tags=settings.tags or None,
                mode=settings.mode,
                id=_run_id(run_directory / "wandb.json"),
                # Offline every start writes its own folder; by the id they are one run when they are synced.
                resume="allow",
                dir=str(run_directory),
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(console="off", silent=True),
            )
        except (wandb.Error, OSError) as error:
            raise EnvironmentProblem(
                "Weights & Biases did not start.",
                where="logging.wandb",
                found=error,
                do="run `wandb login` once, or set logging.wandb.mode=offline and `wandb sync` afterwards",
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """See `Board.add`."""
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        """See `Board.close`."""
        self._run.finish()


def _run_id(path: Path) -> str:
    """The id of the first start, which is made up there."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))["id"]
    except FileNotFoundError:
        written = uuid.uuid4().hex[:8]
        write_json(path, {"id": written})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            "The file that names this run's Weights & Biases run cannot be read.",
            where=path,
            found=error,
            expected='{"id": "..."}',
            do="restore it, or remove it to begin another W&B run",
        ) from error
    return str(written)


def open_boards(run_directory: Path, tensorboard: Path, config: RunConfig, first_step: int) -> list[Board]:
    """What the configuration asks for.

    Args:
        run_directory: The run's.
        tensorboard: Where event files go.
        config: The run configuration.
        first_step: The first step of this start.
    """
    boards: list[Board] = []
    if config.logging.wandb is not None:
        boards.append(WeightsAndBiases(run_directory, config.logging.wandb, config))
    if config.logging.tensorboard:
        boards.append(TensorBoard(tensorboard, first_step))
    return boards
