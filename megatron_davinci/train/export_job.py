"""One export of a checkpoint while training goes on: links to its files, the command, and how that ended."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_davinci.config.export import ExportConfig
from megatron_davinci.train.checkpoint_files import step_folder

_SAID_CHARACTERS = 600
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


@dataclass(frozen=True)
class ExportJob:
    """The export of a step's checkpoint.

    Attributes:
        run: The run directory.
        step: The checkpoint's step.
    """

    run: Path
    step: int

    @property
    def checkpoint(self) -> Path:
        """The checkpoint."""
        return step_folder(self.run / "checkpoints", self.step)

    @property
    def links(self) -> Path:
        """A folder of links to its files, beside it: they stay readable when the checkpoint is pruned."""
        return self.checkpoint.with_name(f".{self.checkpoint.name}.export")

    @property
    def out(self) -> Path:
        """Where the export appears when it is whole."""
        return self.run / "hf" / self.checkpoint.name

    @property
    def log(self) -> Path:
        """What the process says."""
        return self.out.with_name(f"{self.out.name}.log")

    @property
    def is_linked(self) -> bool:
        """Whether the links are there, all of them: the manifest's comes last."""
        return (self.links / "manifest.json").is_file()

    @property
    def source(self) -> Path:
        """What the process reads."""
        return self.links if self.is_linked else self.checkpoint

    @property
    def by_hand(self) -> str:
        """The command that makes the same export."""
        return f"davinci convert to-hf {self.run}@{self.step}"

    def link(self) -> None:
        """Link to all files of the checkpoint. Takes no space of its own, and no time that depends on their size.

        Where the file system knows no hard links there are none, and pruning may take the checkpoint from its reader.

        Raises:
            OSError: The checkpoint is not there, or the file system failed.
        """
        self.unlink()
        names = sorted(
            (path.relative_to(self.checkpoint) for path in self.checkpoint.rglob("*") if path.is_file()),
            key=lambda name: (name.name == "manifest.json", name),
        )
        if not names or names[-1].name != "manifest.json":
            raise FileNotFoundError(
                errno.ENOENT, "the checkpoint is not there any more", str(self.checkpoint)
            )
        try:
            self.links.mkdir(mode=0o700)
            for name in names:
                to = self.links / name
                to.parent.mkdir(mode=0o700, exist_ok=True)
                os.link(self.checkpoint / name, to)
        except OSError as error:
            self.unlink()
            if error.errno not in _NO_LINKS:
                raise

    def unlink(self) -> None:
        """Let go of the checkpoint's files."""
        shutil.rmtree(self.links, ignore_errors=True)

    def command(self, config: ExportConfig) -> list[str]:
        """The words that start the process."""
        words = [sys.executable, "-m", "megatron_davinci.cli.main", "convert", "to-hf"]
        words += [str(self.source), str(self.out), "--run", str(self.run), "--threads", "1"]
        words += ["--dtype", config.dtype] if config.dtype else []
        words += ["--licence", config.licence] if config.licence else []
        return words + ([] if config.verify else ["--skip-verify"])

    def failure(self, code: int) -> str:
        """Why the process ended with a code that is not 0, in its own words."""
        how = f"exit code {code}" if code >= 0 else f"ended by signal {-code}"
        try:
            said = self.log.read_text(errors="replace").strip()
        except OSError:
            said = ""
        # The last that it says is why: an error of ours, or the end of a traceback.
        if "error: " in said and len(last := said[said.rindex("error: ") :]) <= _SAID_CHARACTERS:
            said = last
        return f"{how}: {said[-_SAID_CHARACTERS:]}" if said else how

    def size(self) -> int:
        """Bytes of the export."""
        return sum(path.stat().st_size for path in self.out.iterdir() if path.is_file())
