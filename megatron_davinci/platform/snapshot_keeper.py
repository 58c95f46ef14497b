"""The keeper: a small process beside the trainer that holds a node's snapshots, and outlives the trainer.

It owns memory, not files: each snapshot is a `memfd`, which has no name in any file system, is not limited by the
size of /dev/shm, and is freed by the kernel when its last holder ends. A keeper that is killed leaves nothing behind.

It runs as a script of its own, on the standard library alone, so that it is up in a moment and takes some 10 MB. It
listens on a socket in the abstract namespace: one name, one keeper, and no file that could be left behind. Processes
of another user are turned away, on both sides.

A message is one packet of JSON, an answer likewise; a file descriptor may come with either:

    {"do": "attach", "keep_alive": s}   stay as long as this connection is open, and `s` seconds after the last one;
                                        one that holds nothing does not wait
    {"do": "put", "name": n}  + fd      hold this memory under a name; what had the name is dropped
    {"do": "get", "name": n}            -> {"there": true} + fd
    {"do": "names"}                     -> {"names": {name: bytes}}
    {"do": "drop", "names": [n, ...]}   let go of these
    {"do": "free"}                      let go of everything, and end when nobody is connected
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import struct
import sys
import time
from typing import Any

PACKET = 1 << 20
"""Bytes of the longest message; the names of a node's ranks are far below it."""
_FIRST_SECONDS = 30.0
"""How long a keeper that was started waits for who started it."""
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def owner(connection: socket.socket) -> int:
    """The user id of the process at the other end, as the kernel knows it."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(packed)[1])


def send(connection: socket.socket, message: dict[str, Any], descriptor: int | None = None) -> None:
    """Send one message, with a file descriptor or none."""
    packet = json.dumps(message).encode()
    if descriptor is None:
        connection.sendall(packet)
    else:
        socket.send_fds(connection, [packet], [descriptor])


def receive(connection: socket.socket) -> tuple[dict[str, Any], int | None]:
    """Receive one message and the file descriptor that came with it.

    Raises:
        ConnectionError: The other end has gone, or what it says is no message.
    """
    packet, descriptors, _, _ = socket.recv_fds(connection, PACKET, 1)
    if not packet:
        raise ConnectionResetError("the other end has gone")
    try:
        message = json.loads(packet)
        if not isinstance(message, dict):
            raise ValueError
    except ValueError:
        for descriptor in descriptors:
            os.close(descriptor)
        raise ConnectionError("this is no message") from None
    return message, descriptors[0] if descriptors else None


class _Keeper:
    """Answers messages until it is no longer needed."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener, self.keep_alive = listener, 0.0
        self.kept: dict[str, int] = {}
        self.connections: set[socket.socket] = set()
        self.finished = False

    def serve(self) -> None:
        """Until the run has ended well, or nobody has come for `keep_alive` seconds."""
        selector = selectors.DefaultSelector()
        selector.register(self.listener, selectors.EVENT_READ)
        until = time.monotonic() + _FIRST_SECONDS
        while True:
            wait = None if self.connections else max(0.0, until - time.monotonic())
            ready = selector.select(wait)
            if not ready and not self.connections and time.monotonic() >= until:
                return
            for key, _ in ready:
                if key.fileobj is self.listener:
                    connection, _ = self.listener.accept()
                    if owner(connection) != os.getuid():
                        connection.close()
                        continue
                    self.connections.add(connection)
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                connection = next(one for one in self.connections if one is key.fileobj)
                if not self._answer(connection):
                    selector.unregister(connection)
                    self.connections.discard(connection)
                    connection.close()
                    until = time.monotonic() + (self.keep_alive if self.kept else 0.0)
            if self.finished and not self.connections:
                return

    def _answer(self, connection: socket.socket) -> bool:
        """Answer one message; False where the connection is over."""
        try:
            message, descriptor = receive(connection)
            answer, found = self._do(message, descriptor)
            send(connection, answer, found)
        except (OSError, KeyError, TypeError, ValueError):
            return False
        return True

    def _do(self, message: dict[str, Any], descriptor: int | None) -> tuple[dict[str, Any], int | None]:
        do = message["do"]
        if do == "attach":
            self.keep_alive = float(message["keep_alive"])
            self.finished = False
        elif do == "put" and descriptor is not None:
            self._drop(message["name"])
            self.kept[str(message["name"])] = descriptor
        elif do == "get":
            found = self.kept.get(message["name"])
            return {"there": found is not None}, found
        elif do == "names":
            return {"names": {name: os.fstat(one).st_size for name, one in self.kept.items()}}, None
        elif do == "drop":
            for name in message["names"]:
                self._drop(name)
        elif do == "free":
            for name in list(self.kept):
                self._drop(name)
            self.finished = True
        else:
            raise ValueError(do)
        return {}, None

    def _drop(self, name: str) -> None:
        descriptor = self.kept.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)


def main(address: str) -> None:
    """Listen and serve; a second keeper of one address ends at once."""
    # What ends the trainer's terminal or its group is not meant for the keeper. SIGTERM is.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        try:
            listener.bind("\0" + address)
        except OSError:
            return
        listener.listen(256)
        _Keeper(listener).serve()


if __name__ == "__main__":
    # What follows the address is for people who look at the list of processes.
    main(sys.argv[1])
