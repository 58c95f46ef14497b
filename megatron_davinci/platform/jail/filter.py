"""Which system calls a program in the sandbox may make: a seccomp filter, as BPF.

What no program needs that only computes ends it (SIGSYS): looking into other processes, mounts, namespaces, kernel
modules, keys. What an honest one may try for a better way is refused with an error that it knows how to take.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence

# AUDIT_ARCH_*; x86_64's second set of calls (x32) has this bit.
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000

# Name: number on x86_64, on aarch64 (None where there is none). From 424 on they are the same.
_CALLS: dict[str, tuple[int | None, int | None]] = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "open_by_handle_at": (304, 265),
    "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "acct": (163, 89), "quotactl": (179, 60), "sethostname": (170, 161),
    "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "pidfd_getfd": (438, 438), "mount_setattr": (442, 442),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186),
    "personality": (135, 92), "move_pages": (279, 239), "migrate_pages": (256, 238), "mbind": (237, 235),
    "syslog": (103, 116), "vhangup": (153, 58), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "clone3": (435, 435), "clone": (56, 220), "socket": (41, 198), "prlimit64": (302, 261),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setscheduler": (144, 119), "sched_setattr": (314, 274), "sched_setparam": (142, 118),
    "sched_setaffinity": (203, 122), "fcntl": (72, 25), "ioctl": (16, 29), "socketpair": (53, 199),
    "mmap": (9, 222),
    "open": (2, None), "openat": (257, 56), "openat2": (437, 437), "creat": (85, None), "mkdir": (83, None),
    "mkdirat": (258, 34), "rmdir": (84, None), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "link": (86, None), "linkat": (265, 37), "unlink": (87, None),
    "unlinkat": (263, 35), "symlink": (88, None), "symlinkat": (266, 36), "chmod": (90, None),
    "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "mknod": (133, None),
    "mknodat": (259, 33), "truncate": (76, 45), "ftruncate": (77, 46), "fallocate": (285, 47),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "setxattrat": (463, 463), "removexattrat": (466, 466),
}  # fmt: skip

_ENDED = """ptrace process_vm_readv process_vm_writev kcmp mount umount2 pivot_root chroot unshare setns bpf
perf_event_open userfaultfd kexec_load kexec_file_load init_module finit_module delete_module add_key request_key
keyctl open_by_handle_at swapon swapoff reboot settimeofday clock_settime acct quotactl sethostname setdomainname
iopl ioperm modify_ldt open_tree move_mount fsopen fsconfig fsmount fspick pidfd_getfd mount_setattr""".split()
_ABSENT = "io_uring_setup io_uring_enter io_uring_register clone3".split()
# Memory that no limit of a process counts, and what only concerns the machine.
_REFUSED = """memfd_create memfd_secret fanotify_init name_to_handle_at shmget semget msgget personality move_pages
migrate_pages mbind syslog vhangup adjtimex clock_adjtime process_madvise process_mrelease""".split()
# What reaches other processes of the same user, where no namespace hides them.
_OF_OTHERS = """rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal setpriority ioprio_set sched_setscheduler
sched_setattr sched_setparam sched_setaffinity""".split()
# What Landlock does not keep in: modes, owners, times and attributes of files elsewhere.
_CHANGING = """chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes futimesat utimensat setxattr
lsetxattr fsetxattr removexattr lremovexattr fremovexattr setxattrat removexattrat""".split()
_WRITING = """openat2 creat mkdir mkdirat rmdir rename renameat renameat2 link linkat unlink unlinkat symlink
symlinkat mknod mknodat truncate ftruncate fallocate""".split()
_O_TRUNC = 0o1000
_WRITE_FLAGS = 0o1 | 0o2 | 0o100 | _O_TRUNC  # O_WRONLY, O_RDWR, O_CREAT
# Who is sent a signal when something can be read: anybody of the same user, as by kill(2).
_F_SETOWN, _F_SETOWN_EX, _FIOSETOWN, _SIOCSPGRP = 8, 15, 0x8901, 0x8902
_DATAGRAM = 2  # the bit that SOCK_DGRAM and SOCK_RAW have, and SOCK_STREAM and SOCK_SEQPACKET have not
_MAP_SHARED, _MAP_ANONYMOUS = 0x01, 0x20
_NEW_NAMESPACES = 0x7E020000  # the CLONE_NEW* flags; that of time is for clone3 and unshare only

_LOAD, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _END = 0x7FFF0000, 0x80000000
_NUMBER, _ARCHITECTURE = 0, 4


def _argument(place: int) -> int:
    return 16 + 8 * place  # its low 32 bits, on a little-endian machine


def _error(code: int) -> int:
    return 0x00050000 | code


def _instruction(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("HBBI", code, yes, no, value)


def program(
    machine: str,
    *,
    families: Sequence[int],
    alone: bool,
    signals: bool,
    writes: bool,
    truncates: bool,
    own_pid: int,
) -> bytes:
    """The filter for a program.

    Args:
        machine: `x86_64` or `aarch64`.
        families: Address families of sockets that it may make.
        alone: Whether it sees no processes but its own (a namespace), so that what concerns processes may stay.
        signals: Whether the kernel itself keeps its signals from others (a namespace, or Landlock's scope).
        writes: Whether it may write files at all; something else says where.
        truncates: Whether what says so says it of cutting a file, too, where no right to write is asked for.
        own_pid: Its process number, as it sees it.

    Returns:
        Instructions of 8 bytes (struct sock_filter).
    """
    column = list(_ARCHITECTURES).index(machine)
    made: list[bytes] = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_EQUAL, _ARCHITECTURES[machine], 1, 0),
        _instruction(_RETURN, _END),
        _instruction(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":
        made += [_instruction(_ABOVE, _X32, 0, 1), _instruction(_RETURN, _END)]

    def rule(name: str, *body: bytes) -> None:
        number = _CALLS[name][column]
        if number is not None:
            made.extend([_instruction(_EQUAL, number, 0, len(body)), *body])

    def always(names: Sequence[str], answer: int) -> None:
        for name in names:
            rule(name, _instruction(_RETURN, answer))

    def by_value(name: str, place: int, values: Sequence[int], among: int, else_: int) -> None:
        """One answer where an argument is among these values, another where it is not."""
        tests = [_instruction(_EQUAL, value, len(values) - at, 0) for at, value in enumerate(values)]
        rule(
            name, _instruction(_LOAD, _argument(place)), *tests,
            _instruction(_RETURN, else_), _instruction(_RETURN, among),
        )  # fmt: skip

    def unless(name: str, place: int, allowed: Sequence[int], answer: int) -> None:
        """Allowed with these values of an argument only."""
        by_value(name, place, allowed, _ALLOW, answer)

    def without(name: str, place: int, bits: int, answer: int) -> None:
        """Allowed with none of these bits in an argument."""
        rule(
            name, _instruction(_LOAD, _argument(place)), _instruction(_ANY_BIT, bits, 0, 1),
            _instruction(_RETURN, answer), _instruction(_RETURN, _ALLOW),
        )  # fmt: skip

    def never(name: str, place: int, values: Sequence[int], answer: int) -> None:
        """Allowed with any but these values of an argument."""
        by_value(name, place, values, answer, _ALLOW)

    def cutting_only_to_write(name: str, place: int) -> None:
        """O_TRUNC with O_WRONLY or O_RDWR alone, not with O_RDONLY (0) and not with 3, which opens for neither."""
        rule(
            name, _instruction(_LOAD, _argument(place)), _instruction(_ANY_BIT, _O_TRUNC, 0, 3),
            _instruction(_ANY_BIT, 1, 0, 1), _instruction(_ANY_BIT, 2, 2, 1), _instruction(_ANY_BIT, 2, 0, 1),
            _instruction(_RETURN, _ALLOW), _instruction(_RETURN, _error(errno.EACCES)),
        )  # fmt: skip

    always(_ENDED, _END)
    always(_ABSENT, _error(errno.ENOSYS))
    always(_REFUSED, _error(errno.EPERM))
    without("clone", 0, _NEW_NAMESPACES, _END)
    unless("socket", 0, families, _error(errno.EACCES))
    unless("prlimit64", 0, [0], _error(errno.EPERM))
    # Such memory stays, whole, for as long as a page of it is mapped somewhere: no limit of a process holds it.
    rule(
        "mmap", _instruction(_LOAD, _argument(3)), _instruction(_ANY_BIT, _MAP_ANONYMOUS, 0, 2),
        _instruction(_ANY_BIT, _MAP_SHARED, 0, 1), _instruction(_RETURN, _error(errno.EPERM)),
        _instruction(_RETURN, _ALLOW),
    )  # fmt: skip
    if not alone:
        always(_OF_OTHERS, _error(errno.EPERM))
    if not signals:
        always(["kill", "tkill"], _error(errno.EPERM))
        unless("tgkill", 0, [own_pid], _error(errno.EPERM))  # abort() and raise()
        never("fcntl", 1, [_F_SETOWN, _F_SETOWN_EX], _error(errno.EPERM))
        never("ioctl", 1, [_FIOSETOWN, _SIOCSPGRP], _error(errno.EPERM))
    if not alone:
        always(_CHANGING, _error(errno.EPERM))
        without("socketpair", 1, _DATAGRAM, _error(errno.EACCES))  # one of datagrams sends to any name
    if not writes:
        always(_WRITING, _error(errno.EACCES))
        without("open", 1, _WRITE_FLAGS, _error(errno.EACCES))
        without("openat", 2, _WRITE_FLAGS, _error(errno.EACCES))
    elif not truncates:
        always(["truncate"], _error(errno.EACCES))
        always(["openat2"], _error(errno.ENOSYS))  # its flags lie in memory, where no filter sees them
        cutting_only_to_write("open", 1)
        cutting_only_to_write("openat", 2)
    return b"".join([*made, _instruction(_RETURN, _ALLOW)])


def families(*, unix: bool, network: bool) -> list[int]:
    """Address families: sockets of files where they lead nowhere else, those of the internet where it is allowed."""
    found = [int(socket.AF_UNIX)] if unix else []
    return found + ([int(socket.AF_INET), int(socket.AF_INET6), int(socket.AF_NETLINK)] if network else [])
