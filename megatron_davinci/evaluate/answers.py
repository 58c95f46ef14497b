"""What a checkpoint has answered, kept on disk as it answers: nothing is computed twice, and a stop loses little.

The key of an answer is a digest of all that decides it: the checkpoint, the tokenizer, how the model is computed, and
the request's tokens. A task that is asked again, in another suite or after an interruption, finds its answers; one
whose data, prompt or number of examples has changed has other requests, and asks anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_davinci.files import disk_errors

# Requests that are computed before their answers are written.
PORTION = 1024


def digest_of_checkpoint(manifest: Mapping[str, Any]) -> str:
    """Of a checkpoint: its manifest has the digests of all its files."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def digest_of_folder(folder: Path) -> str | None:
    """The digest of the checkpoint in a folder; None where it cannot be read."""
    try:
        return digest_of_checkpoint(json.loads((folder / "manifest.json").read_bytes()))
    except (OSError, ValueError):
        return None


class Answers:
    """Answers by request.

    Args:
        file: JSON lines; None to keep nothing.
        identity: What decides an answer besides its request; JSON.
        progress: Is told requests answered, and requests in all, of one call.

    Attributes:
        known: Requests that were found answered.
        computed: Requests that were not.
    """

    def __init__(
        self,
        file: Path | None,
        identity: dict[str, Any],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._file, self._progress = file, progress
        self._salt = json.dumps(identity, sort_keys=True)
        self._answers: dict[str, Any] = {}
        self.known = self.computed = 0
        if file is not None and file.exists():
            with disk_errors(file, "reading the answers"):
                content = file.read_bytes()
            # A line without an end was being written when it stopped.
            for line in content.split(b"\n")[:-1]:
                try:
                    key, answer = json.loads(line)
                    self._answers[key] = answer
                except (ValueError, TypeError):
                    continue  # no pair: another command wrote into it, or the disk lost some
            if not content.endswith(b"\n") and content:
                with disk_errors(file, "mending the answers"), open(file, "r+b") as opened:
                    opened.truncate(content.rfind(b"\n") + 1)

    def of(self, requests: Sequence[Any], compute: Callable[[Sequence[int]], list[Any]]) -> list[Any]:
        """The answer to each request.

        Args:
            requests: What is asked; JSON, and to be sorted.
            compute: Is given the places of those that were not answered before, and answers them; JSON.
        """
        keys = [self._key(request) for request in requests]
        self.known += sum(key in self._answers for key in keys)
        missing: dict[Hashable, int] = {}
        for place, key in enumerate(keys):
            if key not in self._answers:
                missing.setdefault(key, place)
        # Neighbours share what they begin with.
        places = sorted(missing.values(), key=lambda place: requests[place])
        for first in range(0, len(places), PORTION):
            portion = places[first : first + PORTION]
            answers = compute(portion)
            self._keep([keys[place] for place in portion], answers)
            self.computed += len(portion)
            self._progress(first + len(portion), len(places))
        return [self._answers[key] for key in keys]

    def _keep(self, keys: Sequence[str], answers: Sequence[Any]) -> None:
        self._answers.update(zip(keys, answers, strict=True))
        if self._file is None:
            return
        lines = "".join(json.dumps([key, answer]) + "\n" for key, answer in zip(keys, answers, strict=True))
        with disk_errors(self._file, "keeping the answers"):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "a") as opened:
                opened.write(lines)

    def _key(self, request: Any) -> str:
        return hashlib.sha256((self._salt + json.dumps(request)).encode()).hexdigest()[:32]
