"""A proxy in front of a store that misbehaves on request: plain sockets, loopback only, one request a connection."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType

STATUSES = {"403": "AccessDenied", "404": "NoSuchKey", "429": "SlowDown", "500": "InternalError", "503": "SlowDown"}
FAULTS = ("500", "short", "503", "timeout", "reset", "429")


def one_in(n: int) -> Callable[[int], str]:
    """Every n-th request fails, each time in another way."""
    return lambda request: FAULTS[request // n % len(FAULTS)] if request % n == n - 1 else ""


class FaultyProxy:
    """`plan(number of the request)` names what goes wrong with it: a status (and a code, as in "403 QuotaExceeded"),
    short, timeout, reset, cut (done, and never answered), or nothing."""

    def __init__(self, port: int, plan: Callable[[int], str], stall: float = 1.5) -> None:
        self.plan, self.stall, self._upstream = plan, stall, port
        self.requests: list[tuple[str, str]] = []  # (range asked for, fault)
        self.targets: list[str] = []  # the path of each
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    @property
    def faults(self) -> list[str]:
        """What went wrong so far."""
        return [fault for _, fault in self.requests if fault]

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            head = b""
            while b"\r\n\r\n" not in head:
                piece = client.recv(65536)
                if not piece:
                    return
                head += piece
            if b"\r\nexpect: 100-continue" in head.lower():
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            length = re.search(rb"(?im)^content-length: *(\d+)", head)
            end = head.index(b"\r\n\r\n") + 4 + (int(length[1]) if length else 0)
            request = bytearray(head)
            while len(request) < end and (piece := client.recv(1 << 18)):
                request += piece
            head = bytes(request)
            asked = re.search(rb"(?im)^range: *bytes=(\S+)", head)
            with self._lock:
                fault = self.plan(len(self.requests))
                self.targets.append(head.split(b" ", 2)[1].decode())
                self.requests.append((asked[1].decode() if asked else "", fault))
            try:
                self._answer(client, head, fault)
            except OSError:  # the client went away, or the server is not there
                _reset(client)

    def _answer(self, client: socket.socket, head: bytes, fault: str) -> None:
        if fault == "timeout":
            time.sleep(self.stall)
        elif fault == "reset" or (fault == "short" and head.startswith(b"HEAD")):
            _reset(client)
        elif fault[:3].isdigit():
            status, _, code = fault.partition(" ")
            code = code or STATUSES[status]
            body = b"" if head.startswith(b"HEAD") else f"<Error><Code>{code}</Code></Error>".encode()
            client.sendall(b"HTTP/1.1 %s No\r\nContent-Length: %d\r\n" % (status.encode(), len(body)))
            client.sendall(b"Content-Type: application/xml\r\nConnection: close\r\n\r\n" + body)
        else:
            answer = self._forwarded(head)
            if fault == "cut":
                _reset(client)
                return
            start = answer.index(b"\r\n\r\n") + 4
            client.sendall(answer if not fault else answer[: start + (len(answer) - start) // 2])

    def _forwarded(self, head: bytes) -> bytes:
        head, gap, body = head.partition(b"\r\n\r\n")
        head = re.sub(rb"(?im)^(connection|expect):[^\r\n]*\r\n", b"", head + b"\r\n")[:-2]
        head = head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1) + gap + body
        with socket.create_connection(("127.0.0.1", self._upstream), timeout=20) as server:
            server.sendall(head)
            answer = bytearray()
            while piece := server.recv(1 << 18):
                answer += piece
        if b"\r\n\r\n" not in answer:
            raise ConnectionError
        return bytes(answer)


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
