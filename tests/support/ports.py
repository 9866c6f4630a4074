"""Ports for what the tests start, so that two processes of tests, which run side by side, never take the same ones.

All lie below the range from which the system takes ports for outgoing connections, and each use has a range of its own:
ranks meet at 16,000 to 20,000, the S3 server takes 10,000 to 15,000 and 20,000 to 25,000, a Slurm cluster 26,000 to
31,000 (tests/cluster/slurm_cluster.py), and its jobs meet at 15,000 and above. Where a process begins to look depends
on its id.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket

import pytest

_STEPS = itertools.count()


def free_port() -> int:
    """A port that nobody has, another one at each call."""
    for step in _STEPS:
        port = 16_000 + (os.getpid() % 40 * 100 + step) % 4_000
        if _free(port):
            return port
    raise AssertionError


def free_ports(count: int, above: int) -> int:
    """The first of `count` ports that nobody has, nor those that lie `above` them."""
    for base in range(10_000 + os.getpid() % 500 * 10, 15_000, 10):
        if _free(*range(base, base + count), *range(base + above, base + above + count)):
            return base
    pytest.fail("no free ports for the S3 server between 10,000 and 25,000")


def _free(*ports: int) -> bool:
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        for port in ports:
            stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
        return True
    return False
