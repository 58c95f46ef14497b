"""Snapshots of a run in the memory of its nodes (REFT, arXiv 2310.12670), between checkpoints on disk.

Each rank copies its state to one of two slots in host memory, which a small process of the node keeps when the
trainer dies. Digest and parity follow while the next step is computed; before that step is on record, all of it is
there, on every rank. So there is always one whole snapshot, and a run that is killed loses `every_steps` steps at the
most.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megatron_davinci.config import Layout, RunConfig
from megatron_davinci.errors import CheckpointError, DavinciError
from megatron_davinci.platform import parity
from megatron_davinci.platform.device import Platform
from megatron_davinci.platform.distributed import broadcast_object
from megatron_davinci.platform.host_memory import DeviceToHost, pin_host_memory
from megatron_davinci.platform.snapshot_memory import (
    Keeper,
    RankMemory,
    digest_of,
    keeper_address,
    memory_bytes,
)
from megatron_davinci.train import checkpoint, checkpoint_files
from megatron_davinci.train import snapshot_place as place
from megatron_davinci.train.checkpoint_files import Checkpoint
from megatron_davinci.train.order import DataOrder
from megatron_davinci.train.run_directory import RunDirectory
from megatron_davinci.train.snapshot_names import identity, memory_name, node_here
from megatron_davinci.train.snapshot_recall import Recall, Recalled, gathered, gloo_group
from megatron_davinci.train.snapshot_state import RankState

_IN_MEMORY = Path("a snapshot in memory")
_LEAVE_SECONDS = 5.0


class Snapshots:
    """Takes snapshots of a run and finds the one to go on from. Every rank calls its methods together.

    As a context it ends what it began: after an error the snapshots stay, for the start that comes; after a run that
    ended well they are freed.

    Args:
        config: The run configuration.
        layout: The ranks.
        directory: The run directory.
        platform: What the run computes on.
    """

    def __init__(
        self, config: RunConfig, layout: Layout, directory: RunDirectory, platform: Platform
    ) -> None:
        self._settings, self._directory, self._platform = config.snapshots, directory, platform
        self.is_on = self._settings.every_steps is not None
        self._timeout = timedelta(seconds=config.parallel.timeout_seconds)
        self._layout = str(layout)
        self._kind = place.kind_of(config, layout)
        self._node = node_here(self._settings)
        self._keeper: Keeper | None = None
        self._recall: Recall | None = None
        self._recalled: Recalled | None = None
        self._strangers: list[str] = []
        self._memory: RankMemory | None = None
        self._state: RankState | None = None
        self._newest: int | None = None  # the slot with the newest snapshot that every rank has
        self._flight: _Flight | None = None
        self._messages: list[str] = []

    # ---- going on from one -------------------------------------------------------------------------------

    def newest(
        self, order: DataOrder, turned_back: Callable[[Checkpoint], str | None]
    ) -> tuple[Checkpoint | None, list[str]]:
        """Find what the run goes on from: the newest snapshot in memory, or a checkpoint on disk that is newer.

        Args:
            order: The run's data order.
            turned_back: As `checkpoint.find` takes it; a snapshot too may be of a past that the run has left.

        Returns:
            It, or None where the run begins; and a line for each newer checkpoint that was passed over. Of the
            snapshots that were, `told` has lines.

        Raises:
            CheckpointError: There are checkpoints and none is good, and no snapshot either.
        """
        folder = self._directory.checkpoints
        found = self._in_memory(order, turned_back)
        if found is None:
            return checkpoint.find(folder, turned_back)
        snapshot = Checkpoint(_IN_MEMORY, found.description)
        newer = broadcast_object(_is_newer(folder, found.step) if dist.get_rank() == 0 else None)
        if newer:
            # They are looked at only where they could matter: to verify a checkpoint is to read all of it.
            with contextlib.suppress(CheckpointError):
                on_disk, passed_over = checkpoint.find(folder, turned_back)
                if on_disk is not None and on_disk.step > found.step:
                    self._recalled = None
                    return on_disk, passed_over
        from_parity = f"; rank {', '.join(map(str, found.rebuilt))} from parity" if found.rebuilt else ""
        self._messages.append(
            f"Taken from the nodes' memory: the snapshot of step {found.step:,}{from_parity}."
        )
        return snapshot, []

    def load(self, found: Checkpoint, wrapped: Sequence[Any], optimizer: Any) -> bool:
        """Fill model and optimizer, if `found` is a snapshot; otherwise it is the caller's to load.

        Args:
            found: What `newest` found.
            wrapped: The model chunks, wrapped.
            optimizer: Megatron-Core's optimizer.
        """
        if self._recalled is None or found.folder != _IN_MEMORY:
            return False
        RankState(wrapped, optimizer).read(self._recalled.data)
        return True

    def _in_memory(
        self, order: DataOrder, turned_back: Callable[[Checkpoint], str | None]
    ) -> Recalled | None:
        if not self.is_on:
            return None
        run = broadcast_object(identity(self._directory.path) if dist.get_rank() == 0 else None)
        if run is None:
            return None
        keeper = Keeper(keeper_address(run, self._node), self._settings.keep_alive_seconds, start=False)
        # Kept open from here on: a keeper whose time is over must not end under the start that came.
        self._keeper = keeper
        self._recall = Recall(keeper, self._node, self._kind, self._timeout)

        def problem_of(description: dict[str, Any]) -> str | None:
            try:
                order.check_extends(description.get("journal"), _IN_MEMORY)
            except CheckpointError as error:
                return error.what.removesuffix(".")
            return turned_back(Checkpoint(_IN_MEMORY, description))

        self._recalled = self._recall.find(problem_of)
        self._messages += self._recall.messages
        return self._recalled

    # ---- taking them -------------------------------------------------------------------------------------

    def prepare(self, wrapped: Sequence[Any], optimizer: Any) -> None:
        """Have memory and parity groups ready, before the first step.

        Raises:
            EnvironmentProblem: A node does not have the memory, there is one node where parity is a must, or no
                keeper could be started.
        """
        if not self.is_on:
            return
        self._state = RankState(wrapped, optimizer)
        run = broadcast_object(identity(self._directory.path) if dist.get_rank() == 0 else None)
        self._start = broadcast_object(uuid.uuid4().hex if dist.get_rank() == 0 else None)
        places = gathered((self._node, self._state.nbytes))
        nodes = [node for node, _ in places]
        groups = place.groups_of(nodes, self._settings)
        self._members = next(group for group in groups if dist.get_rank() in group)
        if self._keeper is None or not self._keeper.is_there:
            self._keeper = Keeper(
                keeper_address(run, self._node),
                self._settings.keep_alive_seconds,
                label=str(self._directory.path),
            )
        left = self._recall.own if self._recall is not None else None
        self._memory = place.take_memory(self._keeper, left, [places[rank][1] for rank in self._members])
        taken_over = self._memory is left
        self._newest = self._recalled.slot if taken_over and self._recalled is not None else None
        for slot in (0, 1):
            # What was not gone on from is of a past that may not come again.
            if slot != self._newest:
                self._memory.invalidate(slot)
        if self._recall is not None:
            self._strangers = self._recall.strangers()
            self._recall.close(keep_own=taken_over)
        self._recall = self._recalled = None
        self._group = gloo_group([group for group in groups if len(group) > 1], self._timeout)
        self._copy = DeviceToHost(self._platform)
        if self._platform.name == "cuda":
            pin_host_memory(*self._memory.address)
            _hold_before_updates(optimizer, self._copy)
        self._introduce(self._memory, groups, nodes)

    @property
    def in_flight(self) -> bool:
        """Whether one is being taken."""
        return self._flight is not None

    @property
    def state_bytes(self) -> int:
        """Of this rank's part of a snapshot; 0 where none are taken."""
        return 0 if self._state is None else self._state.nbytes

    def is_due(self, step: int) -> bool:
        """Whether a snapshot is to be taken after a step."""
        every = self._settings.every_steps
        return self._state is not None and every is not None and step % every == 0

    def take(self, description: dict[str, Any]) -> None:
        """Take one, into the slot of the older one. Digest and parity follow beside the next step.

        Args:
            description: The position of the run, as a checkpoint has it; the journal's on rank 0.
        """
        self.settle()
        if self._state is None or self._memory is None:
            return
        slot = 0 if self._newest is None else 1 - self._newest
        self._memory.invalidate(slot)
        with self._copy.copying():
            self._state.write(self._memory.region(slot, "data"), description)
        record = {
            "step": description["step"],
            "start": self._start,
            "kind": self._kind,
            "layout": self._layout,
            "group": self._members,
        }
        self._flight = _Flight(slot, lambda aborted: self._finish(slot, record, aborted))

    def settle(self) -> None:
        """Wait until the snapshot that is being taken, if one is, is whole on every rank."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        flight.join()
        # One number; what went wrong is asked for only where something did.
        failed = torch.tensor(int(flight.problem is not None), device=self._platform.device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if failed:
            problem = next(problem for problem in gathered(flight.problem) if problem)
            self._messages.append(f"No further snapshots are taken: {problem}.")
            self._state = None
            return
        first, self._newest = self._newest is None, flight.slot
        if first and self._keeper is not None:
            self._keeper.drop(self._strangers)

    def told(self) -> list[str]:
        """What there is to say since the last time."""
        said, self._messages = self._messages, []
        return said

    def _finish(self, slot: int, record: dict[str, Any], aborted: Callable[[], bool]) -> None:
        """Beside the next step: digest, mark, parity, mark."""
        memory = self._memory
        assert memory is not None and self._keeper is not None
        self._copy.wait()
        data = memory.region(slot, "data")
        digest = digest_of(data)
        memory.mark(slot, "data", {**record, "digest": digest})
        if self._group is not None:
            digests = parity.gather(bytes.fromhex(digest), self._group, aborted)
            region = memory.region(slot, "parity")
            region[:] = 0
            parity.exchange(data, region, self._group, aborted)
            memory.mark(
                slot, "parity", {"digest": digest_of(region), "digests": [one.hex() for one in digests]}
            )
        if not self._keeper.is_there:
            # It was killed, and this process is the last that holds the memory.
            self._keeper.close()
            address, label = self._keeper.address, self._keeper.label
            self._keeper = Keeper(address, self._settings.keep_alive_seconds, label=label)
            self._keeper.put(memory_name(dist.get_rank()), memory.descriptor)

    def _introduce(self, memory: RankMemory, groups: list[list[int]], nodes: list[str]) -> None:
        size = memory_bytes(memory.data_bytes, memory.parity_bytes)
        sizes = sorted({len(group) for group in groups})
        over = "no parity" if sizes[-1] == 1 else f"parity over {' or '.join(map(str, sizes))} nodes"
        self._messages.append(
            f"Snapshots in memory every {self._settings.every_steps} steps: {size / 1e6:,.1f} MB a rank, "
            f"{len(set(nodes))} node{'s' if len(set(nodes)) > 1 else ''}, {over}."
        )

    # ---- the end -----------------------------------------------------------------------------------------

    def __enter__(self) -> Snapshots:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.settle()
        elif self._flight is not None:
            self._flight.abort(_LEAVE_SECONDS)
        if self._keeper is not None:
            if kind is None:
                self._keeper.free()
            self._keeper.close()
            self._keeper = None


class _Flight:
    """What is done about a snapshot beside the next step."""

    def __init__(self, slot: int, work: Callable[[Callable[[], bool]], None]) -> None:
        self.slot = slot
        self.problem: str | None = None
        self._aborted = threading.Event()
        self._work = work
        self._thread = threading.Thread(target=self._run, name="snapshot", daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def abort(self, seconds: float) -> None:
        self._aborted.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._work(self._aborted.is_set)
        except parity.Aborted:
            self.problem = "given up"
        except (DavinciError, OSError, RuntimeError, ValueError) as error:
            self.problem = str(error).splitlines()[0].removesuffix(".")


def _hold_before_updates(optimizer: Any, copy: DeviceToHost) -> None:
    """Have the device wait for the copy before the optimizer changes what is being copied."""
    update = optimizer.step

    def held() -> Any:
        copy.hold()
        return update()

    optimizer.step = held


def _is_newer(checkpoints: Path, step: int) -> bool:
    """Whether there is a checkpoint of a later step, by its name."""
    return any(
        int(folder.name.removeprefix("step-")) > step for folder in checkpoint_files.steps(checkpoints)
    )
