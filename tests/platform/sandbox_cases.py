"""Hostile programs and their honest twins, drawn from a seed, and a host that notices what gets through.

A hostile program says `BREACH` and what it managed. It is stopped when it says nothing of the kind, the host has
noticed nothing, and nothing of it is left. Its twin does what looks alike and is allowed; it is accepted when it says
what it should.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_davinci.platform.sandbox import MIB, Limits, Ran, run_python

SECRET = "a-key-that-nobody-is-to-see"
LIMITS = Limits(
    wall_seconds=20, cpu_seconds=10, memory_bytes=256 * MIB, processes=12, file_bytes=8 * MIB, disk_bytes=24 * MIB,
    files=200, output_bytes=256 * 1024,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A program.

    Attributes:
        kind: What it tries.
        text: The program.
        says: What it has to print, without spaces around it; None of a hostile one.
        limits: What it may use.
        writes: Whether it needs to write files.
    """

    kind: str
    text: str
    says: str | None = None
    limits: Limits = LIMITS
    writes: bool = True


@dataclass
class Host:
    """What there is to be harmed: a file, a secret, a server, this process. Used with `with`."""

    folder: Path = field(init=False)
    connected: int = 0

    def __enter__(self) -> Host:
        self.folder = Path(tempfile.mkdtemp(prefix="sandbox-host-"))
        self.folder.chmod(0o777)
        self.canary = self.folder / "canary"
        self.canary.write_text("whole")
        self.canary.chmod(0o666)
        self.secret = self.folder / "secret"
        self.secret.write_text(SECRET)
        self.secret.chmod(0o600)
        os.environ["SANDBOX_TEST_KEY"] = SECRET
        self._servers = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
        self.port = self._servers[0].getsockname()[1]
        self.path = str(self.folder / "socket")
        self._servers[1].bind(self.path)
        self._servers[1].listen()
        os.chmod(self.path, 0o777)
        for server in self._servers:
            threading.Thread(target=self._serve, args=(server,), daemon=True).start()
        return self

    def _serve(self, server: socket.socket) -> None:
        while True:
            try:
                server.accept()[0].close()
            except OSError:
                return
            self.connected += 1

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()
        os.environ.pop("SANDBOX_TEST_KEY", None)
        shutil.rmtree(self.folder)

    def harm(self, token: str) -> list[str]:
        """What has happened to it, and which processes have this word among their arguments."""
        found = []
        if self.canary.read_text() != "whole" or len(os.listdir(self.folder)) != 3:
            found.append("files outside have changed")
        if self.connected:
            found.append("it got a connection")
        for name in os.listdir("/proc"):
            if name.isdecimal() and int(name) != os.getpid():
                try:
                    words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if token.encode() in words:
                    found.append(f"process {name} is left")
        return found


def judged(case: Case, host: Host, way: str | None = None) -> tuple[Ran, list[str]]:
    """Run a case, and say what is wrong: harm done by a hostile program, or an honest one that was refused."""
    began = time.monotonic()
    ran = run_python(case.text, limits=case.limits, way=way, environment={"TOKEN": token_of(case)})
    took = time.monotonic() - began
    wrong = host.harm(token_of(case))
    if "BREACH" in ran.stdout:
        wrong.append(f"it says: {ran.stdout[:300]}")
    if SECRET in ran.stdout + ran.stderr:
        wrong.append("it has seen the secret")
    if took > case.limits.wall_seconds + 30:
        wrong.append(f"it took {took:.0f} s")
    if len(ran.stdout) + len(ran.stderr) > 2 * case.limits.output_bytes:
        wrong.append("its output is not bounded")
    if case.says is not None and (ran.status != "ok" or ran.stdout.strip() != case.says):
        wrong.append(
            f"an honest program: {ran.status}, {ran.code}, {ran.stdout[-200:]!r}, {ran.stderr[-500:]}"
        )
    return ran, wrong


def token_of(case: Case) -> str:
    """A word that marks a program's processes."""
    return f"sandbox-case-{case.kind.replace(' ', '-')}"


_TRY = """
import ctypes, os, signal, socket, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, act):
    try:
        found = act()
    except (OSError, ValueError, RuntimeError, subprocess.SubprocessError):
        return
    if found is None or found:
        print("BREACH", name, found if found is not None else "", flush=True)
"""


def _program(body: str, *, tries: bool = True) -> str:
    return (_TRY if tries else "") + textwrap.dedent(body)


def hostile(seed: int, host: Host) -> Iterator[Case]:
    """One program of every hostile kind."""
    draw = random.Random(seed)
    name = f"n{draw.randrange(10**9)}"
    canary, secret = str(host.canary), str(host.secret)
    size = draw.choice([1, 3, 7]) * MIB
    me = os.getpid()

    def case(kind: str, body: str, **changes: object) -> Case:
        return Case(f"{kind}", _program(body), limits=replace(LIMITS, **changes))

    yield case("fork bomb", draw.choice([
        "while True:\n    try: os.fork()\n    except OSError: pass",
        "while True:\n    try:\n        if os.fork() == 0: os.setsid()\n    except OSError: time.sleep(0)",
        "word = os.environ['TOKEN']\nwhile True:\n    try: subprocess.Popen([sys.executable, '-c', 'input()', word])"
        "\n    except OSError: pass",
    ]), wall_seconds=1)  # fmt: skip
    yield case(
        "network",
        f"""
        attempt("tcp", lambda: socket.create_connection(("127.0.0.1", {host.port}), 1))
        attempt("unix", lambda: socket.socket(socket.AF_UNIX).connect({host.path!r}))
        attempt("udp", lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"{name}", ("127.0.0.1", {host.port})))
        attempt("raw", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        attempt("io_uring", lambda: libc.syscall(425, 8, ctypes.create_string_buffer(120)) >= 0)
    """,
    )
    yield case(
        "write outside",
        f"""
        for path in ({canary!r}, {canary!r} + "{name}", "/etc/{name}", "/usr/{name}", "/var/tmp/{name}", "/{name}",
                     sys.executable, os.__file__, "/proc/sys/kernel/hostname", "/proc/1/oom_score_adj"):
            attempt(path, lambda: open(path, "r+" if os.path.exists(path) else "w").write("{name}"))
        attempt("remove", lambda: os.remove({canary!r}))
        attempt("rename", lambda: os.rename({canary!r}, {canary!r} + "2"))
        attempt("modes", lambda: os.chmod({canary!r}, 0))
    """,
    )
    yield case(
        "symlink escape",
        f"""
        os.symlink({canary!r}, "{name}")
        os.symlink("/", "root")
        attempt("through a link", lambda: open("{name}", "w").write("{name}"))
        attempt("through the root", lambda: open("root" + {canary!r}, "w").write("{name}"))
        attempt("from above", lambda: open("../" * 20 + {canary!r}[1:], "w").write("{name}"))
        attempt("a hard link", lambda: os.link({canary!r}, "hard"))
        attempt("reading", lambda: open("{name}").read())
    """,
    )
    yield case(
        "endless loop",
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGXCPU, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        while True: pass
    """,
        wall_seconds=draw.choice([0.6, 0.8]),
    )
    yield case("endless sleep", "while True: time.sleep(60)", wall_seconds=draw.choice([0.3, 0.5]))
    yield case(
        "memory",
        f"""
        held = []
        while True: held.append(bytearray({size}))
    """,
    )
    yield case(
        "memory of many",
        f"""
        for _ in range(8):
            if os.fork() == 0: break
        held = []
        try:
            while True: held.append(b"x" * {size})
        except MemoryError:
            time.sleep(9)
    """,
    )
    yield case(
        "memory without a process",
        """
        attempt("memfd", lambda: os.memfd_create("held"))
        attempt("shared", lambda: libc.shmget(0, 1 << 28, 0o1600) >= 0)
        attempt("shared pages", lambda: __import__("mmap").mmap(-1, 1 << 28))
        attempt("zeros", lambda: open("/dev/zero", "r+b"))
    """,
    )
    yield case(
        "signals",
        f"""
        for pid in ({me}, os.getppid() if os.getppid() > 1 else {me}, 1 if os.getpid() != 1 else {me}):
            attempt(f"probe {{pid}}", lambda: os.kill(pid, 0) if pid == {me} else False)
            for number in ({draw.choice(["signal.SIGTERM", "signal.SIGUSR1"])}, signal.SIGKILL):
                attempt(f"signal {{pid}}", lambda: os.kill(pid, number) if pid == {me} else False)
        attempt("limits", lambda: __import__("resource").prlimit({me}, 7, (10, 10)))
        attempt("priority", lambda: os.setpriority(os.PRIO_PROCESS, {me}, 19))
        attempt("pidfd", lambda: signal.pidfd_send_signal(os.pidfd_open({me}), signal.SIGTERM))
        try: os.kill(-1, signal.SIGKILL)
        except OSError: pass
    """,
    )
    yield case(
        "daemon",
        """
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.close(0); os.close(1); os.close(2)
                os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)", os.environ["TOKEN"]])
            os._exit(0)
        os.wait()
        time.sleep(0.1)
    """,
    )
    yield case(
        "huge output",
        f"""
        while True: os.write({draw.choice([1, 2])}, b"{name}" * 1000)
    """,
    )
    yield case(
        "full disk",
        f"""
        total = 0
        try:
            for number in range(1000):
                with open(f"{name}-{{number}}", "wb") as file:
                    for _ in range(7): total += file.write(bytes({MIB}))
                    file.flush()
                if total > {2 * LIMITS.disk_bytes}: print("BREACH disk", total, flush=True)
        except OSError as error:
            raise SystemExit(str(error))
    """,
    )
    yield case(
        "huge file",
        f"""
        def grow():
            with open("{name}", "wb") as file:
                file.truncate({2 * LIMITS.file_bytes})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        attempt("sparse", grow)
        attempt("allocated", lambda: os.posix_fallocate(os.open("a{name}", os.O_CREAT | os.O_RDWR), 0, 1 << 30))
    """,
    )
    yield case(
        "many files",
        f"""
        made = 0
        try:
            while made < {LIMITS.files * 5}:
                open(f"{name}-{{made}}", "w").close()
                made += 1
                if made % 300 == 0: time.sleep(0.3)
            print("BREACH files", made, flush=True)
        except OSError as error:
            raise SystemExit(str(error))
    """,
    )
    yield case(
        "deep folders",
        f"""
        try:
            while True:
                os.mkdir("{name}"); os.chdir("{name}")
        except OSError as error:
            time.sleep(0.5)
            raise SystemExit(str(error))
    """,
    )
    yield case(
        "open files",
        """
        held = []
        try:
            while len(held) < 5000: held.append(open("/dev/null"))
            print("BREACH open files", len(held))
        except OSError as error:
            raise SystemExit(str(error))
    """,
    )
    yield case(
        "threads",
        """
        import threading
        count = 0
        try:
            while count < 500:
                threading.Thread(target=time.sleep, args=(9,), daemon=True).start(); count += 1
            print("BREACH threads", count)
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    """,
    )
    yield case(
        "secrets",
        f"""
        attempt("variable", lambda: os.environ.get("SANDBOX_TEST_KEY") or False)
        above = f"/proc/{{os.getppid()}}"
        for path in ({secret!r}, "/etc/shadow", "/proc/{me}/environ", "/proc/1/environ", above + "/environ",
                     "/proc/{me}/mem", above + "/mem", "/proc/1/mem", "/dev/mem", "/proc/kcore"):
            attempt(path, lambda: open(path, "rb").read(64) or False)
    """,
    )
    yield case(
        "rights",
        f"""
        attempt("user", lambda: os.setuid(0))
        attempt("group", lambda: os.setgroups([0]))
        attempt("su", lambda: subprocess.run(["su", "-c", "id"], check=True, capture_output=True, timeout=2).stdout)
        attempt("limit", lambda: __import__("resource").setrlimit(7, (100000, 100000)))
        attempt("device", lambda: os.mknod("{name}", 0o60666, os.makedev(8, 0)))
        attempt("host name", lambda: socket.sethostname("{name}"))
    """,
    )
    forbidden = draw.choice([
        f"libc.ptrace(16, {me}, 0, 0)", f"libc.process_vm_readv({me}, 0, 0, 0, 0, 0)", "libc.unshare(0x10000000)",
        "libc.mount(b'none', b'/', b'tmpfs', 0, b'')", "libc.umount2(b'/', 2)", "libc.chroot(b'/')",
        "libc.setns(0, 0)", "libc.reboot(0)", "libc.acct(0)", "libc.swapon(b'/', 0)",
    ])  # fmt: skip
    yield case(
        "forbidden call",
        f"""
        {forbidden}
        print("BREACH it goes on")
    """,
    )


def honest(seed: int) -> Iterator[Case]:
    """One honest program of each kind: what looks like a hostile one and is allowed."""
    draw = random.Random(seed + 1)
    a, b = draw.randrange(1000), draw.randrange(1000)
    name = f"n{draw.randrange(10**9)}"

    def case(kind: str, body: str, says: object, *, writes: bool = False, **changes: object) -> Case:
        text = textwrap.dedent("import os, signal, subprocess, sys, time\n") + textwrap.dedent(body)
        return Case(
            kind,
            text,
            str(says),
            replace(LIMITS, **{"wall_seconds": 60, "cpu_seconds": 20, **changes}),
            writes,
        )

    yield case(
        "children",
        f"""
        for number in range(4):
            if os.fork() == 0: os._exit(number)
        print(sorted(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(4)), {a} + {b})
    """,
        f"[0, 1, 2, 3] {a + b}",
    )
    yield case(
        "a subprocess",
        f"""
        print(subprocess.run([sys.executable, "-c", "print({a} * {b})"], capture_output=True, text=True).stdout)
    """,
        a * b,
        writes=True,
    )
    yield case(
        "sockets of its own",
        f"""
        import asyncio, socket
        async def wait():
            await asyncio.sleep(0.01)
            return {a}
        one, other = socket.socketpair()
        one.send(b"{b}")
        print(asyncio.run(wait()), other.recv(10).decode())
    """,
        f"{a} {b}",
    )
    yield case(
        "files",
        f"""
        import pathlib, tempfile
        os.makedirs("{name}/deeper")
        pathlib.Path("{name}/deeper/file").write_text("{a}")
        os.symlink("deeper/file", "{name}/link")
        with tempfile.NamedTemporaryFile("w+") as file:
            file.write("{b}"); file.flush(); file.seek(0)
            print(pathlib.Path("{name}/link").read_text(), file.read(), sorted(os.listdir("{name}")))
    """,
        f"{a} {b} ['deeper', 'link']",
        writes=True,
    )
    yield case(
        "a loop",
        f"""
        total = 0
        for number in range(200_000): total += number % {a + 1}
        print(total)
    """,
        sum(number % (a + 1) for number in range(200_000)),
    )
    yield case(
        "memory",
        f"""
        held = bytearray({96 * MIB})
        held[::4096] = bytes([1]) * len(held[::4096])
        print(sum(held[::4096]))
    """,
        96 * MIB // 4096,
    )
    yield case(
        "signals of its own",
        """
        seen = []
        signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        time.sleep(0.05)
        print(seen)
    """,
        "[1]",
    )
    yield case(
        "output",
        f"""
        print("{name}" * 2000)
    """,
        name * 2000,
    )
    yield case(
        "a disk's worth",
        f"""
        for number in range(3):
            with open(f"{name}{{number}}", "wb") as file: file.write(bytes({4 * MIB}))
        print(sum(os.path.getsize(f"{name}{{number}}") for number in range(3)))
    """,
        12 * MIB,
        writes=True,
    )
    yield case(
        "threads",
        f"""
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(4) as pool: print(sum(pool.map(lambda number: number * {a}, range(20))))
    """,
        190 * a,
    )
    yield case(
        "a library",
        f"""
        import collections, decimal, fractions, hashlib, itertools, json, re, sqlite3, statistics, typing, unittest
        base = sqlite3.connect(":memory:")
        print(base.execute("select {a} + {b}").fetchone()[0], hashlib.sha256(b"{name}").hexdigest()[:0], end="")
        print(fractions.Fraction({a}, 7))
    """,
        f"{a + b} " + (f"{a}/7" if a % 7 else f"{a // 7}"),
    )
    yield case(
        "arrays",
        f"""
        import numpy as np
        print(int((np.arange(100) * {a}).sum()))
    """,
        4950 * a,
        memory_bytes=1024 * MIB,
        wall_seconds=10,
    )
    yield case(
        "a process of its own that it stops",
        """
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(90)"])
        child.terminate()
        print(child.wait())
    """,
        -15,
    )
