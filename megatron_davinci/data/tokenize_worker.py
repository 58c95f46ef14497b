"""Who does the work of a tokenising job: this process, or others that it starts.

A worker is `python -m megatron_davinci.data.tokenize_worker FOLDER`. It takes tasks from standard input and answers
on standard output, a JSON object a line; texts and tokens go through files. It ends when its input does, in the
middle of whatever it is at: a job that is killed leaves nobody behind who writes.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from megatron_davinci import errors
from megatron_davinci.data.encode_part import PartEncoder
from megatron_davinci.data.fast_bpe import Backend, Encoder, FastEncoder, ReferenceEncoder
from megatron_davinci.data.job_plan import Plan
from megatron_davinci.data.text_inputs import Piece
from megatron_davinci.data.tokenizer import LateTokenizer, Tokenizer
from megatron_davinci.errors import DavinciError, EnvironmentProblem

if TYPE_CHECKING:
    from megatron_davinci.data.assemble import Assembler

Task = dict[str, Any]
Answer = dict[str, Any]


class Hands:
    """Does tasks, in the process that it is in.

    Args:
        folder: The job's.
        tokenizer: The job's.
        encoder: One for it, which is taken if it is of the backend that tasks ask for.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer | LateTokenizer, encoder: Encoder | None) -> None:
        self.plan = Plan.load(folder)
        self._folder, self._tokenizer = folder, tokenizer
        self._encoders = {} if encoder is None else {encoder.name.split()[0]: encoder}

    def encoder(self, backend: Backend) -> Encoder:
        """The encoder of a backend, made once. Whether it may be taken has been asked by who gives tasks."""
        if backend not in self._encoders:
            tokenizer = self._tokenizer
            reference = backend == "tokenizers"
            made = ReferenceEncoder(tokenizer) if reference else FastEncoder(tokenizer, asked=True)
            self._encoders[backend] = made
        return self._encoders[backend]

    @cached_property
    def _assembler(self) -> Assembler:
        from megatron_davinci.data.assemble import Assembler  # takes as long to import as all the rest

        return Assembler(self.plan, self._folder)

    def do(self, task: Task, progress: Callable[[int], None] | None = None) -> Answer:
        """Do a task.

        Raises:
            DavinciError: It cannot be done.
        """
        number = task["number"]
        if task["do"] == "part":
            plan = self.plan
            parts = PartEncoder(
                self.encoder(task["backend"]),
                plan.fields,
                plan.eod_id if plan.append_eod else None,
                np.dtype(plan.dtype),
                plan.vocab_size,
                plan.keep_empty,
            )
            piece = Piece(*task["piece"])
            record = parts.encode(piece, number, self._folder / "parts", task["on_error"], progress)
            return {**task, "record": asdict(record)}
        if task["do"] == "shard":
            shard = self._assembler.in_order(number, tuple(task["first"]), [tuple(task["end"])])
        else:
            counts = np.fromfile(self._folder / "counts", np.int64)
            assert self.plan.shuffle is not None
            shard = self._assembler.shuffled(number, task["first"], task["end"], counts, self.plan.shuffle)
        return {**task, "record": shard.model_dump()}


class InProcess:
    """The pool of one: tasks are done when their answer is asked for."""

    def __init__(self, hands: Hands) -> None:
        self._hands, self._tasks, self.idle = hands, deque[Task](), 1
        self.progress: Callable[[int, int], None] = lambda number, done: None

    def submit(self, task: Task) -> None:
        """Take a task."""
        self._tasks.append(task)
        self.idle = 0

    def answer(self) -> Answer:
        """Do it."""
        task = self._tasks.popleft()
        done = self._hands.do(task, lambda done: self.progress(task["number"], done))
        self.idle = 1
        return done

    def close(self) -> None:
        """Nobody to end."""


class Processes:
    """Worker processes.

    Args:
        folder: The job's; its tokenizer is there, which they load, and then wait.
        count: How many.
        tokenizer: The job's.
        backend: What will probably encode.
    """

    def __init__(self, folder: Path, count: int, tokenizer: Tokenizer, backend: Backend) -> None:
        self._answers: queue.Queue[tuple[int, Answer | None] | Answer | BaseException] = queue.Queue()
        package = str(Path(errors.__file__).parents[1])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
            # One thread a process: there is a process for each core.
            "TOKENIZERS_PARALLELISM": "false",
            "RAYON_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self.progress: Callable[[int, int], None] = lambda number, done: None
        vocabulary = str(tokenizer.vocab_size)
        self._workers = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, os.fspath(folder), backend, vocabulary, tokenizer.eod_token],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                # An interrupt from the keyboard is for the job, which then ends its workers.
                start_new_session=True,
            )
            for _ in range(count)
        ]
        self._idle = list(range(count))
        for n in range(count):
            threading.Thread(target=self._listen, args=(n,), daemon=True).start()

    @property
    def idle(self) -> int:
        """Workers without a task."""
        return len(self._idle)

    def _listen(self, n: int) -> None:
        out = self._workers[n].stdout
        assert out is not None
        for line in out:
            self._answers.put((n, json.loads(line)))
        self._answers.put((n, None))

    def submit(self, task: Task) -> None:
        """Hand a task to an idle worker."""
        given = self._workers[self._idle.pop()].stdin
        assert given is not None
        with suppress(BrokenPipeError):  # the worker's end is among the answers
            given.write(json.dumps(task).encode() + b"\n")
            given.flush()

    def post(self, answer: Answer | BaseException) -> None:
        """Put an answer among those of the workers: that of a thread of this process, or why it has none."""
        self._answers.put(answer)

    def answer(self) -> Answer:
        """The next answer of any worker, or one that was posted.

        Raises:
            DavinciError: A task cannot be done.
            EnvironmentProblem: A worker died.
        """
        while True:
            got = self._answers.get()
            if isinstance(got, BaseException):
                raise got
            if not isinstance(got, tuple):
                return got
            n, answer = got
            if answer is None:
                code = self._workers[n].wait()
                raise EnvironmentProblem(
                    "A worker of a tokenising job has died.",
                    found=f"exit status {code}"
                    + (", killed: perhaps for want of memory" if code == -9 else ""),
                    do="start the same command again, with fewer workers if memory was short: finished work is kept",
                )
            if "progress" in answer:
                self.progress(answer["number"], answer["progress"])
                continue
            if "error" in answer:
                kind, *said = answer["error"]
                what, where, found, expected, do = said
                raise getattr(errors, kind)(what, where=where, found=found, expected=expected, do=do)
            self._idle.append(n)
            return answer

    def close(self) -> None:
        """End the workers, whatever they are at, and wait for it."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                assert pipe is not None
                with suppress(OSError):
                    pipe.close()


def main(folder: Path, backend: Backend, vocab_size: int, eod_token: str) -> None:
    """Get ready, and take tasks from standard input until it ends."""
    say = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not come between the answers
    tasks: queue.Queue[Task] = queue.Queue()
    threading.Thread(target=_listen, args=(tasks,), daemon=True).start()

    def tell(answer: Answer) -> None:
        say.write(json.dumps(answer).encode() + b"\n")

    # Held to the end: a job that goes on waits for the workers of the one that was killed.
    lock = open(folder / "workers.lock", "ab")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_SH)
    tokenizer = LateTokenizer(folder / "tokenizer.json", vocab_size, eod_token)
    encoder = None
    if backend != "tokenizers":
        with suppress(DavinciError):  # whether gigatoken can be taken is found out by who gives tasks
            encoder = FastEncoder(tokenizer, asked=True)
    hands = None
    while True:
        task = tasks.get()
        try:
            hands = hands or Hands(folder, tokenizer, encoder)
            number = task["number"]
            tell(hands.do(task, lambda done, number=number: tell({"progress": done, "number": number})))  # type: ignore[misc]
        except DavinciError as error:
            parts = (error.where, error.found, error.expected, error.do)
            texts = [None if part is None else str(part) for part in parts]
            tell({"error": [type(error).__name__, error.what, *texts]})
        except Exception:
            traceback.print_exc()
            os._exit(1)


def _listen(tasks: queue.Queue[Task]) -> None:
    for line in sys.stdin.buffer:
        tasks.put(json.loads(line))
    # The job is over or was killed. Not sys.exit: the task at hand must not go on writing.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), cast(Backend, sys.argv[2]), int(sys.argv[3]), sys.argv[4])
