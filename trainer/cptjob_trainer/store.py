"""The coordinator's key-value store (torch's TCPStore): hosted, reached, and what the keys are.

Imports torch; callers that must stay light import this module inside a function.
"""

import contextlib
import os
import socket
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

#: Set by the coordinator once the data is prepared: the directory of the prepared data.
PREPARED_KEY = "cptjob/prepared"
#: Set by a launcher whose processes have ended: a termination message as JSON, for the coordinator.
DONE_KEY = "cptjob/done"
#: What launchers and workers warn of while the job goes on, a line each.
WARNINGS_KEY = "cptjob/warnings"


def done_key(run_id: str) -> str:
    """The same for the other launchers of its run; those of the next run do not look at it."""
    return f"{DONE_KEY}/{run_id}"


def warn(client: TCPStore, text: str) -> None:
    """Adds one line to what the coordinator tells the person; a lost store costs the line only."""
    with contextlib.suppress(RuntimeError):
        # torch's stubs leave this method out.
        client.append(WARNINGS_KEY, " ".join(text.split()) + "\n")  # type: ignore[attr-defined]


def warnings(hosted: TCPStore) -> list[str]:
    """All lines so far."""
    found = hosted.check([WARNINGS_KEY])
    return hosted.get(WARNINGS_KEY).decode().splitlines() if found else []


def host(address: str, port: int, timeout_seconds: float = 60.0) -> TCPStore:
    """Hosts a store that listens on ``address`` only; port 0 takes a free one (``store.port``)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(4096)
        # Left to itself the store listens on every address, and it asks for no password.
        descriptor = os.dup(listener.fileno())
        return TCPStore(
            _reachable(address),
            listener.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_seconds),
            master_listen_fd=descriptor,
        )


def _reachable(address: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)


def connect(host_port: str, timeout_seconds: float) -> TCPStore:
    """Connects to the store at "host:port". Raises RuntimeError when it is not there in time."""
    name, _, port = host_port.rpartition(":")
    return TCPStore(
        name,
        int(port),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_seconds),
    )
