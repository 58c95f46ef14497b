"""Answers of models by the content of their questions, on disk: what was answered is never asked again.

One SQLite file in write-ahead mode: an answer is there after its commit, also when the process is killed right
after it. Two processes that asked the same at the same time both use the answer that was written first. The file
must lie on a local disk: SQLite's locks do not hold on NFS.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import stat
from pathlib import Path
from typing import Any, NamedTuple

from megatron_davinci.errors import DataError, EnvironmentProblem

_VERSION = 1
_BUSY_SECONDS = 60.0


class Answer(NamedTuple):
    """What a model answered.

    Attributes:
        text: The answer.
        finish: Why it ends: `stop`, or `length` where it ran into the limit; other words are the server's.
        prompt_tokens: As the server counts them; 0 where it does not say.
        completion_tokens: Likewise.
    """

    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int


def question_key(question: dict[str, Any]) -> bytes:
    """Names a question by its content: BLAKE2b of its JSON, 128 bits."""
    written = json.dumps(question, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(written.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Answers:
    """A file of answers. It is used by the thread that opens it.

    Args:
        path: The file; made if it is not there, with its folder.
        read_only: Look only; the file must be there.

    Raises:
        DataError: The file is not one of answers, or is damaged.
        EnvironmentProblem: The disk refuses.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path = path
        try:
            if read_only:
                self._base = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._base = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
                self._prepare()
            [version] = self._base.execute("PRAGMA user_version").fetchone()
        except (sqlite3.Error, OSError) as error:
            raise self._problem(error) from error
        if version != _VERSION:
            raise DataError(
                "A file of answers was written by another version.",
                where=path,
                found=version,
                expected=_VERSION,
                do="name another file as `answers`",
            )

    def _prepare(self) -> None:
        # Answers may hold what was in private documents: nobody may read them whom the group does not have.
        mode = stat.S_IMODE(self.path.stat().st_mode)
        if mode & 0o007:
            self.path.chmod(mode & 0o770)
        self._base.execute("PRAGMA journal_mode=WAL")
        self._base.execute("PRAGMA synchronous=NORMAL")
        self._base.execute("BEGIN IMMEDIATE")
        [version] = self._base.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._base.execute(
                "CREATE TABLE answers (question BLOB PRIMARY KEY, text TEXT NOT NULL, finish TEXT NOT NULL,"
                " prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL) WITHOUT ROWID"
            )
            self._base.execute(f"PRAGMA user_version={_VERSION}")
        self._base.execute("COMMIT")

    def get(self, key: bytes) -> Answer | None:
        """The answer to a question; None if it was not asked."""
        try:
            row = self._base.execute(
                "SELECT text, finish, prompt_tokens, completion_tokens FROM answers WHERE question = ?",
                (key,),
            ).fetchone()
        except sqlite3.Error as error:
            raise self._problem(error) from error
        return None if row is None else Answer(*row)

    def put(self, key: bytes, answer: Answer) -> Answer:
        """Write an answer, unless there is one; return the one that counts."""
        # SQLite has no word for half a surrogate pair, which JSON may hold.
        clean = answer._replace(text=answer.text.encode("utf-8", "replace").decode())
        try:
            self._base.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)", (key, *clean))
        except sqlite3.Error as error:
            raise self._problem(error) from error
        written = self.get(key)
        assert written is not None
        return written

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()

    def _problem(self, error: Exception) -> Exception:
        if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            return DataError(
                "This is not a file of answers, or it is damaged.",
                where=self.path,
                found=error,
                do="name another file as `answers`; moved away, it is made anew and everything asked again",
            )
        return EnvironmentProblem(
            "The answers of a model cannot be kept.",
            where=self.path,
            found=error,
            expected="a file on a local disk with free space",
            do="free space, or name another file as `answers`; then start the same command again",
        )
