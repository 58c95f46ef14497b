"""The errors that a user can mend, each said in one screen.

Every check on something from outside (a config, a dataset, a checkpoint, a layout, a disk) raises one of
these. The command line prints them without a traceback and exits with the error's `code`.
"""

from __future__ import annotations

# What a process ends with, beside 0 (done), 1 (a bug, with its traceback) and 128 + n (ended by signal n).
MEND = 2  # there is something for the user to mend
UNHEALTHY = 3  # training itself is in trouble: numbers that are not finite, spikes, again and again
HANG = 4  # a rank stood still
LOST_PEER = 5  # another rank ended first
CORRUPT = 6  # this machine, or one beside it, computes wrong
AGAIN = 75  # asked to stop, and nothing is lost: start it again (EX_TEMPFAIL of sysexits.h)


class DavinciError(Exception):
    """An error with the four things that its reader needs.

    Args:
        what: One sentence: what is wrong.
        where: The file, config field or byte range that it was found in.
        found: What was there.
        expected: What should have been there.
        do: What to do about it.

    Attributes:
        code: What a process that says it ends with.
        label: What the line that says it begins with.
    """

    code = MEND
    label = "error"

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        do: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.found = found
        self.expected = expected
        self.do = do
        super().__init__(self.render())

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process boundaries in the tests' rank pools; keyword arguments need this.
        return (_rebuild, (type(self), self.what, self.where, self.found, self.expected, self.do))

    def render(self) -> str:
        """The message as it is printed: `what`, then one indented line for each thing that is known."""
        lines = [self.what]
        for label, value in (
            ("where", self.where),
            ("found", self.found),
            ("expected", self.expected),
            ("do", self.do),
        ):
            if value is not None:
                first, *rest = str(value).splitlines() or [""]
                lines.append(f"  {label + ':':<10}{first}")
                lines.extend(" " * 12 + line for line in rest)
        return "\n".join(lines)


def _rebuild(
    kind: type[DavinciError], what: str, where: object, found: object, expected: object, do: str | None
) -> DavinciError:
    return kind(what, where=where, found=found, expected=expected, do=do)


class ConfigError(DavinciError):
    """The run configuration is wrong: an unknown key, an impossible value, a layout that does not divide."""


class DataError(DavinciError):
    """A dataset, manifest, tokenizer or journal is missing, damaged or does not fit the run."""


class CheckpointError(DavinciError):
    """A checkpoint is missing, damaged, or of another model."""


class EnvironmentProblem(DavinciError):
    """The machine cannot do what was asked: no space, no such device, a package that is not there."""


class LostPeer(EnvironmentProblem):
    """A collective failed because another rank has gone. To start again may be all that it needs."""

    code = LOST_PEER


class Unhealthy(DavinciError):
    """Training is in trouble that its policy does not pass over: numbers that are not finite, spikes."""

    code = UNHEALTHY


class Corrupt(DavinciError):
    """A rank computed, or holds, other bits than it should."""

    code = CORRUPT


class Stopped(DavinciError):
    """The run was asked to end by a signal, and has, with nothing lost.

    Args:
        what: One sentence.
        where: Where the run is.
        do: How it goes on.
    """

    code = AGAIN
    label = "stopped"
