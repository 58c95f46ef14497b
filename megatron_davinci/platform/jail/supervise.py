"""The jail: reads what to run, shuts it in, watches it, ends it, and says what came of it."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from types import FrameType

from megatron_davinci.platform.jail import enter, landlock, root, system, watch
from megatron_davinci.platform.jail.spec import LANDLOCK, NAMESPACES, Said, Spec

_TICK = 0.02  # seconds between looks at what the processes use
_DISK_TICK = 0.004  # and at what their files take, where no disk of their own bounds it: it fills in a moment
_DISK_PART = 4  # pauses are as many times as long as what it takes to look
_ENDED_BY_US = -int(signal.SIGKILL)


def main() -> None:
    """Run one program; JSON comes in by standard input and goes out by standard output."""
    spec = Spec(**json.load(sys.stdin))
    said = Said()
    signal.signal(signal.SIGTERM, _asked_to_end)
    system.end_with_parent(signal.SIGTERM)
    try:
        _Jail(spec, said).run()
    except OSError as error:
        said.setup = str(error)
    except _Asked:
        return
    sys.stdout.write(json.dumps(asdict(said)))


class _Asked(BaseException):
    """The process that wanted the program has gone, or wants it no more."""


def _asked_to_end(number: int, frame: FrameType | None) -> None:
    raise _Asked


class _Jail:
    def __init__(self, spec: Spec, said: Said) -> None:
        self.spec, self.said = spec, said
        self.user, self.outside = enter.free_user(), os.geteuid()
        self.namespaces = spec.way == NAMESPACES
        self.readable = [*root.SYSTEM, *(root.NETWORK if spec.network else ()), *spec.readable]

    def run(self) -> None:
        """Start the program, watch it until it has ended, and end what it has left."""
        spec = self.spec
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        word, word_end = os.pipe()  # why it could not start, or how it ended
        given, given_end = os.pipe()
        if self.namespaces:
            self._leave()
        else:
            system.adopt_orphans()
            system.hide_memory()
            self._write_files(spec.scratch)
        before = self._before()
        child = os.fork()
        if child == 0:
            for descriptor in (out, err, word, given_end):
                os.close(descriptor)  # or standard input would never end
            self._child(word_end, (given, out_end, err_end), before)
        for descriptor in (out_end, err_end, word_end, given):
            os.close(descriptor)
        try:
            self._watch(child, out, err, word, given_end)
        finally:
            self._end(child)

    def _leave(self) -> None:
        """Into namespaces of their own."""
        spec = self.spec
        flags = system.NEWPID | system.NEWIPC | system.NEWUTS
        flags |= 0 if spec.network else system.NEWNET
        if self.user is not None:
            try:
                return system.unshare(flags)
            except OSError:
                self.user = None  # no right to: as any user, then
        user, group = os.geteuid(), os.getegid()
        system.unshare(flags | system.NEWUSER)
        # Inside it is another user, so that root here is nobody there.
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{enter.NOBODY} {user} 1"),
            ("gid_map", f"{enter.NOBODY} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        return None

    def _before(self) -> int:
        """Processes and threads that count against the limit and are not the program's."""
        if self.namespaces or self.user not in (None, enter.NOBODY):
            return 4
        count, mine = 0, os.getuid() if self.user is None else self.user
        for name in os.listdir("/proc"):
            with suppress(OSError):
                if name.isdecimal() and os.stat(f"/proc/{name}").st_uid == mine:
                    count += len(os.listdir(f"/proc/{name}/task"))
        return count

    def _write_files(self, folder: str) -> None:
        for name, text in self.spec.files.items():
            path = os.path.join(folder, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(_encoded(text))
        if self.user is not None and not self.namespaces:
            for at, folders, files in os.walk(folder):
                for name in (".", *folders, *files):
                    os.chown(os.path.join(at, name), self.user, self.user)

    def _child(self, word: int, stdio: tuple[int, int, int], before: int) -> None:
        """The program itself, or the first process of its namespace. Does not return."""
        spec = self.spec
        try:
            # Handlers of Python's: a first process has to have none.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            home = spec.scratch
            if self.namespaces:
                system.end_with_parent(signal.SIGKILL)
                system.unshare(system.NEWNS)  # here: its parent goes on to see the whole of /proc
                proc = root.build(spec.scratch, self.readable, spec.disk, spec.files_count, processes=True)
                os.write(word, b"P" if proc else b"p")
                home = root.HOME
                self._write_files(home)
                program = os.fork()
                if program:
                    self._first(program, word, stdio)
            enter.become_program(
                spec, home=home, user=self.user, before=before, readable=self.readable, stdio=stdio
            )
        except BaseException as error:
            with suppress(OSError):
                os.write(word, b"E" + str(error).encode()[:500])
        os._exit(127)

    def _first(self, program: int, word: int, stdio: tuple[int, int, int]) -> None:
        """The first process of a namespace waits for the others; when it ends, the kernel ends them all."""
        system.hide_memory()
        for descriptor in stdio:
            os.close(descriptor)
        while True:
            pid, status = os.wait()
            if pid == program:
                os.write(word, b"C" + str(os.waitstatus_to_exitcode(status)).encode())
                os._exit(0)

    def _watch(self, child: int, out: int, err: int, word: int, given: int) -> None:
        spec, said = self.spec, self.said
        began = time.monotonic()
        stdin = _encoded(spec.stdin)
        os.set_blocking(given, False)
        parts: dict[int, bytearray] = {out: bytearray(), err: bytearray(), word: bytearray()}
        poll = select.poll()
        for descriptor in parts:
            poll.register(descriptor, select.POLLIN)
        poll.register(given, select.POLLOUT)
        looked, measured, code = 0.0, 0.0, None
        pause = _TICK if self.namespaces else _DISK_TICK
        while True:
            now = time.monotonic()
            if now - looked >= _TICK:
                looked = now
                self._look(child)
            if not self.namespaces and now - measured >= pause:
                self._measure_disk()
                measured = time.monotonic()
                pause = min(_TICK, max(_DISK_TICK, _DISK_PART * (measured - now)))
            if said.ended is None and now - began > spec.wall:
                said.ended = "timeout"
            if said.ended is not None:
                break
            for descriptor, _ in poll.poll(1000 * min(pause, max(0.001, spec.wall - (now - began)))):
                if descriptor == given:
                    try:
                        stdin = stdin[os.write(given, stdin[:65536]) :] if stdin else stdin
                    except BlockingIOError:
                        continue
                    except OSError:
                        stdin = b""
                    if not stdin:
                        poll.unregister(given)
                        os.close(given)
                    continue
                part = os.read(descriptor, 65536)
                if not part:
                    poll.unregister(descriptor)
                parts[descriptor] += part
                if descriptor != word and len(parts[out]) + len(parts[err]) > spec.output:
                    said.ended = "output"
            code = self._code(child, parts[word], word)
            if code is not None:
                break
        self._look(child)
        if not self.namespaces:
            self._measure_disk()
        said.wall = time.monotonic() - began
        self._end(child)
        # Of those that were waited for, by whom they were started.
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        said.cpu = max(said.cpu, used.ru_utime + used.ru_stime)
        said.peak = max(said.peak, used.ru_maxrss * 1024)
        _drain(out, parts[out], spec.output)
        _drain(err, parts[err], spec.output)
        said.out = bytes(parts[out][: spec.output]).decode("latin-1")
        said.err = bytes(parts[err][: spec.output]).decode("latin-1")
        said.code = _ENDED_BY_US if code is None else code
        said.user = self.outside if self.user is None else self.user
        self._facts(b"P" in parts[word][:1])

    def _code(self, child: int, words: bytearray, word: int) -> int | None:
        """How the program ended, if it has; `words` have been read from `word`, and get what more is there."""
        if self.namespaces:
            code = _told(words)
            if code is None and os.waitpid(child, os.WNOHANG)[0] == child:
                # The namespace's first process may have told it and ended since they were read.
                _drain(word, words, 1000)
                code = _told(words)
                return _ENDED_BY_US if code is None else code  # without a word it was killed from outside
            return code
        _told(words)
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid != child:
            return None
        _drain(word, words, 1000)
        _told(words)
        return os.waitstatus_to_exitcode(status)

    def _look(self, child: int) -> None:
        spec, said = self.spec, self.said
        pids = watch.below(child) if self.namespaces else watch.below(os.getpid())
        used = watch.usage(pids)
        first = watch.usage([child]).cpu if self.namespaces else 0.0
        said.peak, said.most = max(said.peak, used.memory), max(said.most, used.processes)
        said.cpu = max(said.cpu, used.cpu + first)
        if said.ended is not None:
            return
        if used.memory > spec.memory:
            said.ended = "memory"
        elif used.processes > spec.processes:
            said.ended = "processes"
        elif used.cpu > spec.cpu:
            said.ended = "timeout"

    def _measure_disk(self) -> None:
        if self.said.ended is None:
            size, count = watch.size_of(self.spec.scratch)
            if size > self.spec.disk or count > self.spec.files_count:
                self.said.ended = "disk"

    def _end(self, child: int) -> None:
        if not self.namespaces:
            return watch.end_all(None if self.user == enter.NOBODY else self.user)
        with suppress(OSError):
            os.kill(child, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(child, 0)
        return None

    def _facts(self, proc: bool) -> None:
        has, way = landlock.version(), self.spec.way
        network = "allowed" if self.spec.network else None
        if way == NAMESPACES:
            self.said.facts = {
                "files": "a root of its own, read-only but for a disk in memory",
                "processes": "a namespace of its own" + ("" if proc else ", without /proc"),
                "network": network or "a namespace of its own, with nothing in it",
            }
        else:
            self.said.facts = {
                "files": f"Landlock {has}"
                if way == LANDLOCK
                else "read as its user may; none can be written",
                "processes": "of a user of its own"
                if self.user is not None
                else "of its user, found by descent",
                "network": network or "no sockets",
            }
        self.said.facts["calls"] = "seccomp"


def _encoded(text: str) -> bytes:
    """A text as UTF-8; half a surrogate pair, as JSON may have it, is for the program to be wrong about."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _told(words: bytearray) -> int | None:
    """The exit code that the first process of a namespace has written; an error of the jail itself is raised."""
    said = bytes(words).lstrip(b"Pp")
    if said.startswith(b"E"):
        raise OSError(said[1:].decode(errors="replace"))
    return int(said[1:]) if said.startswith(b"C") else None


def _drain(descriptor: int, into: bytearray, most: int) -> None:
    """What is still in a pipe, when all that could write to it has ended."""
    os.set_blocking(descriptor, False)
    with suppress(OSError):
        while len(into) <= most and (part := os.read(descriptor, 65536)):
            into += part
