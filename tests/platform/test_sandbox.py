"""Hostile programs are stopped and do no harm, honest ones pass: on each way that keeps programs in, as any user."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_davinci.errors import ConfigError
from megatron_davinci.platform import sandbox
from megatron_davinci.platform.jail import filter as calls
from megatron_davinci.platform.jail import supervise, system
from megatron_davinci.platform.sandbox import Limits, NoSandbox, run_program, run_python
from tests.cases import is_long
from tests.platform.sandbox_cases import LIMITS, Case, Host, honest, hostile, judged

WAYS = [way for way, why in sandbox.available_ways().items() if why is None]
# By default what stands for the others; under the weaker ways only what they do in other ways than the strongest.
_LEFT_FOR_LONG = (
    "huge file", "many files", "deep folders", "open files", "threads", "endless sleep", "rights", "output",
    "memory without a process", "a subprocess", "a disk's worth", "arrays", "a loop", "signals of its own",
    "a library",
)  # fmt: skip
_OF_WEAKER = ("fork bomb", "write outside", "files")
# Under seccomp alone a program reads what its user may, and cannot end what it has started.
_NOT_OF_SECCOMP = ("secrets", "a process of its own that it stops")


@pytest.fixture(scope="module")
def host():
    with Host() as made:
        yield made


def chosen(cases: Iterator[Case], way: str) -> list[Case]:
    kept = list(cases)
    if way == "seccomp":
        kept = [
            one for one in kept if (one.says is None or not one.writes) and one.kind not in _NOT_OF_SECCOMP
        ]
    if is_long():
        return kept
    return [
        one for one in kept if (one.kind not in _LEFT_FOR_LONG if way == WAYS[0] else one.kind in _OF_WEAKER)
    ]


@pytest.mark.parametrize("way", WAYS)
def test_hostile_programs_are_stopped_and_do_no_harm(way, host):
    wrong, statuses = {}, {}
    for case in chosen(hostile(7, host), way):
        ran, found = judged(case, host, way)
        statuses[case.kind] = ran.status
        if found:
            wrong[case.kind] = found
    assert wrong == {}
    expected = {"fork bomb": {"timeout", "processes"}, "daemon": {"ok"}}
    if way == WAYS[0]:
        expected |= {
            "endless loop": {"timeout"},
            "memory": {"memory"},
            "memory of many": {"memory"},
            "huge output": {"output"},
            "full disk": {"disk"},
            "forbidden call": {"forbidden"},
        }
    assert {
        kind: statuses[kind] for kind, of in expected.items() if kind in statuses and statuses[kind] not in of
    } == {}


@pytest.mark.parametrize("way", WAYS)
def test_honest_programs_pass(way, host):
    assert {one.kind: found for one in chosen(honest(7), way) if (found := judged(one, host, way)[1])} == {}


def test_a_breach_would_be_seen(host):
    """The host notices: without a sandbox, the same programs get through."""
    case = next(one for one in hostile(7, host) if one.kind == "write outside")
    text = re.sub(r'attempt\("(remove|rename|modes)"', r'0 and attempt("\1"', case.text)
    text = text[: text.index('"/etc/')] + text[text.index("):\n    attempt(path") :]
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert "BREACH" in done.stdout and host.harm("nothing")
    for path in host.folder.iterdir():
        if path.name not in ("canary", "secret", "socket"):
            path.unlink()
    host.canary.write_text("whole")
    host.canary.chmod(0o666)
    assert host.harm("nothing") == []
    program = "import time; print('here', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program, "left-over"], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"here\n"
        assert host.harm("left-over") == [f"process {process.pid} is left"]
        process.kill()


def test_what_a_program_is_given_and_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ran = run_python(
        "import os, sys\nprint(sys.stdin.read(), open('a/b.txt').read(), os.environ['WORD'])\n"
        "import resource\nprint(open('half', 'rb').read(), resource.getrlimit(resource.RLIMIT_CPU))\n"
        "print('é', file=sys.stderr)\nprint(sorted(os.environ)[:2])\nraise SystemExit(7)",
        stdin="in",
        files={"a/b.txt": "file", "half": "\ud800"},
        environment={"WORD": "variable"},
        packages=False,
    )
    assert (ran.status, ran.code) == ("failed", 7) and not ran.ok
    assert ran.stdout.startswith("in file variable\nb'\\xed\\xa0\\x80' ") and ran.stderr == "é\n"
    assert "(10, 11)" in ran.stdout, "SIGXCPU says that its time is over before SIGKILL ends it"
    assert 0 < ran.cpu_seconds < 10 and 0 < ran.wall_seconds < 10 and ran.peak_bytes > 1e6
    assert ran.isolation["way"] in sandbox.WAYS and ran.isolation["calls"] == "seccomp"
    if os.geteuid() == 0 and ran.isolation["way"] == "namespaces":
        assert ran.user != 0, "root's programs are nobody's"
    assert os.listdir(tmp_path) == [], "nothing of it is left"


def test_what_cannot_be_run_is_said():
    with pytest.raises(ConfigError, match="leaves its folder"):
        run_python("", files={"../up": ""})
    with pytest.raises(ConfigError, match="no such way"):
        run_python("", way="trust")
    with pytest.raises(ConfigError, match=r"limits\.memory_bytes"):
        Limits(memory_bytes=0)
    with pytest.raises(NoSandbox, match="No such file"):
        run_program(["/usr/bin/there-is-none-of-this-name"])


def test_without_any_way_nothing_is_run(monkeypatch):
    for way in sandbox.WAYS:
        monkeypatch.setitem(sandbox._tried, (way, "denied"), "not on this machine")
    with pytest.raises(NoSandbox, match="landlock: not on this machine"):
        run_python("print(1)")


BARE = """
import struct
from megatron_davinci.platform import sandbox
from megatron_davinci.platform.jail import supervise, system
# landlock_create_ruleset is answered by ENOSYS, as by a kernel that has none.
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, system.LANDLOCK_CREATE), (6, 0, 0, 0x50026), (6, 0, 0, 0x7FFF0000)]
system.gain_nothing()
system.install_filter(b"".join(struct.pack("HBBI", *step) for step in steps))
print(sandbox._try("landlock", "denied"))
"""


def test_without_landlock_there_is_no_such_way():
    """Not the way without the rule, which would let a program write wherever its user may."""
    done = subprocess.run(
        [sys.executable, "-c", BARE], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert "no Landlock" in done.stdout, done.stderr


ORDINARY = """
import sys
from megatron_davinci.platform import sandbox
from tests.platform.sandbox_cases import Host, hostile, honest, judged
with Host() as host:
    for way, why in sandbox.available_ways().items():
        if why is not None:
            print(way, "is not here:", why.replace("\\n", " "))
            continue
        for case in [*hostile(3, host), *honest(3)]:
            if case.kind in {kinds} and (way != "seccomp" or not case.writes or case.says is None):
                ran, wrong = judged(case, host, way)
                print(way, case.kind, wrong or "as it should be")
"""


@pytest.mark.skipif("namespaces" not in WAYS, reason="no namespaces here")
def test_no_signal_of_a_program_reaches_the_first_process_of_its_namespace():
    """The kernel keeps from it what it has no handler for. With one, a program could end it."""
    ran = run_python("print(open('/proc/1/status').read())", packages=False, way="namespaces")
    assert re.search(r"^SigCgt:\s+0+$", ran.stdout, re.MULTILINE), ran


@pytest.mark.parametrize(("told", "code"), [(b"PC-31", -31), (b"pC0", 0), (b"P", -9), (b"", -9)])
def test_how_a_program_ended_is_read_also_where_its_namespace_has_ended_since(told, code):
    word, end = os.pipe()
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        os.write(end, told)
        os.close(end)
        os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)
        words = bytearray()
        assert supervise._Jail._code(types.SimpleNamespace(namespaces=True), gone.pid, words, word) == code
    os.close(word)
    assert words == told


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests are an ordinary user's already")
def test_an_ordinary_user_has_it_too(tmp_path):
    python = "/usr/bin/python3"  # this one's may lie where another user cannot go
    root = Path(__file__).parents[2]
    try:
        ready = subprocess.run(
            [python, "-c", "import sys, megatron_davinci; assert sys.version_info >= (3, 11)"],
            user=54321, group=54321, extra_groups=[], env={"PYTHONPATH": str(root)}, cwd="/", capture_output=True,
        )  # fmt: skip
    except OSError:
        ready = None
    if ready is None or ready.returncode:
        pytest.skip("no Python that another user can run")
    kinds = ["write outside", "daemon"]
    kinds += (
        ["fork bomb", "network", "symlink escape", "memory of many", "full disk", "files", "children"]
        if is_long()
        else []
    )
    done = subprocess.run(
        [python, "-c", ORDINARY.format(kinds=kinds)],
        user=54321, group=54321, extra_groups=[], env={"PYTHONPATH": str(root)}, cwd="/", capture_output=True,
        text=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert [line for line in lines if "as it should be" not in line and "is not here" not in line] == [], (
        lines
    )
    assert len(lines) >= len(kinds), done.stderr


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_answers_as_the_kernel_reads_it(machine):
    strict = calls.program(
        machine, families=[1], alone=False, signals=False, writes=False, truncates=False, own_pid=77
    )
    column = ("x86_64", "aarch64").index(machine)

    def answer(name: str, *arguments: int, architecture: int | None = None, program: bytes = strict) -> int:
        number = calls._CALLS[name][column] if name in calls._CALLS else 1_000
        architecture = architecture or {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
        data = {0: number, 4: architecture} | {16 + 8 * at: value for at, value in enumerate(arguments)}
        return interpret(program, data)

    allow, end = 0x7FFF0000, 0x80000000
    assert answer("an unknown one") == allow
    assert answer("an unknown one", architecture=0x40000003) == end
    assert answer("ptrace", 0, 0) == end and answer("mount") == end
    assert answer("io_uring_setup") == 0x50000 | 38
    assert answer("socket", 1) == allow and answer("socket", 2) == 0x50000 | 13
    assert answer("clone", 0x11) == allow and answer("clone", 0x10000011) == end
    assert answer("tgkill", 77, 77, 6) == allow and answer("tgkill", 78, 78, 6) == 0x50000 | 1
    assert answer("openat", 3, 0, 0o2000000) == allow and answer("openat", 3, 0, 0o101) == 0x50000 | 13
    assert answer("prlimit64", 0, 7) == allow and answer("prlimit64", 5, 7) == 0x50000 | 1
    early = calls.program(
        machine, families=[1], alone=False, signals=False, writes=True, truncates=False, own_pid=77
    )
    assert answer("truncate", program=early) == 0x50000 | 13
    assert answer("openat2", program=early) == 0x50000 | 38
    for flags, allowed in ((0, True), (0o1101, True), (0o1102, True), (0o1000, False), (0o1003, False)):
        assert (answer("openat", 3, 0, flags, program=early) == allow) == allowed, oct(flags)
    alone = calls.program(
        machine, families=[1], alone=True, signals=True, writes=True, truncates=True, own_pid=2
    )
    assert answer("mmap", 0, 4096, 3, 0x22) == allow and answer("mmap", 0, 4096, 3, 0x01) == allow
    assert {answer("mmap", 0, 4096, 3, flags, program=alone) for flags in (0x21, 0x4021)} == {0x50000 | 1}
    assert answer("fcntl", 3, 4) == allow and answer("fcntl", 3, 8) == answer("fcntl", 3, 15) == 0x50000 | 1
    assert answer("ioctl", 3, 0x5401) == allow and answer("ioctl", 3, 0x8901) == 0x50000 | 1
    assert answer("socketpair", 1, 0o2000001) == allow and answer("socketpair", 1, 0o2000002) == 0x50000 | 13
    assert answer("fcntl", 3, 8, program=alone) == answer("socketpair", 1, 2, program=alone) == allow
    assert len(strict) // 8 < 4096, "as many instructions as the kernel takes"
    numbers = [pair[column] for pair in calls._CALLS.values() if pair[column] is not None]
    assert len(numbers) == len(set(numbers)), "no number stands for two calls"


def interpret(program: bytes, data: dict[int, int]) -> int:
    """What a seccomp program returns: the few instructions that ours has, by seccomp(2)."""
    held, place = 0, 0
    steps = list(struct.iter_unpack("HBBI", program))
    while True:
        code, yes, no, value = steps[place]
        place += 1
        if code == 0x20:
            held = data.get(value, 0)
        elif code == 0x15:
            place += yes if held == value else no
        elif code == 0x35:
            place += yes if held >= value else no
        elif code == 0x45:
            place += yes if held & value else no
        else:
            assert code == 0x06
            return value


def test_the_numbers_of_calls_are_the_kernel_s():
    """Against the headers where they are installed; a wrong number would let a call through."""
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if system.MACHINE != "x86_64" or not header.exists():
        pytest.skip("no headers of the kernel")
    known = dict(re.findall(r"#define __NR_(\w+) (\d+)", header.read_text()))
    ours = {name: str(pair[0]) for name, pair in calls._CALLS.items() if pair[0] is not None}
    assert {
        name: (number, known[name]) for name, number in ours.items() if known.get(name, number) != number
    } == {}
    assert len(ours.keys() & known.keys()) > 100
    assert LIMITS.memory_bytes < Limits().memory_bytes
