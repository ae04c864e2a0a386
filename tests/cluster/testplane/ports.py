"""Ports that nothing uses now and no outgoing connection will take."""

import random
import socket
from pathlib import Path

LOWEST = 10_000


def free_ports(count: int) -> list[int]:
    """That many ports of 127.0.0.1, below those that the kernel gives to outgoing connections.

    One of those could be taken while the API server is down for a moment, or a client that tries to
    reach it could connect to itself.
    """
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(LOWEST, _first_outgoing()), 2_000):
        if len(ports) == count:
            break
        if _is_free(port):
            ports.append(port)
    return ports


def _first_outgoing() -> int:
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text("ascii")
    except OSError:
        return 32_768
    return max(int(text.split()[0]), LOWEST + 2_000)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
