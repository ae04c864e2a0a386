"""A computer of its own on this one: its processes, mounts and network are apart from ours.

Its first process is a child of this one. When that ends, the kernel ends every process in it and
takes its mounts and links away, so nothing of a machine outlives the tests.
"""

import subprocess
import sys
import time
from pathlib import Path

from testplane.daemon import Daemon, DaemonError

BRIDGE = "cluster"
PREFIX = "10.77.0"  # the nodes' network; this side has .1
HERE = f"{PREFIX}.1"
POD_PREFIX = "10.244"  # pods of the machine of number N: 10.244.N.0/24
START_SECONDS = 20.0


def make_bridge() -> None:
    """Joins the machines in the network namespace of this process, which must be one of its own.

    Raises DaemonError in the machine's own namespace: nothing is to be changed there.
    """
    links = [line.split()[1].rstrip(":") for line in run("ip", "-o", "link").splitlines()]
    if BRIDGE in links:
        return
    if links != ["lo"]:
        raise DaemonError("real nodes want a network namespace of their own: run `make e2e`")
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "address", "add", f"{HERE}/24", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def run(*command: str) -> str:
    """What it prints. Raises DaemonError with what it says when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DaemonError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


class Machine:
    """number: 1 to 9, its place in the network. folder: gets the logs of what runs in it."""

    def __init__(self, name: str, number: int, folder: Path) -> None:
        self.name, self.number, self.folder = name, number, folder
        self.address = f"{PREFIX}.{10 + number}"
        self.pods = f"{POD_PREFIX}.{number}.0/24"
        self._first: Daemon | None = None
        self.daemons: dict[str, Daemon] = {}

    def start(self) -> None:
        """Switches it on; only its first process runs then."""
        script = 'mount --make-rshared / && ip link set lo up && exec "$@"'
        reaper = [sys.executable, str(Path(__file__).with_name("init.py"))]
        apart = ["--net", "--mount", "--propagation=slave", "--pid", "--fork", "--mount-proc"]
        command = ["unshare", *apart, "--kill-child", "sh", "-c", script, "sh", *reaper]
        self._first = Daemon(f"machine {self.name}", command, self.folder / "machine.log")
        self._first.start()
        self._wait_for_link()
        self._connect()

    def stop(self) -> None:
        """Pulls the plug: every process in it is killed at once."""
        if self._first is not None:
            self._first.kill()
        self._first = None
        for daemon in self.daemons.values():
            daemon.kill()
        self.daemons.clear()

    def spawn(self, name: str, *command: str) -> Daemon:
        """Starts a program that goes on running in it."""
        daemon = Daemon(name, [*self._enter(), *command], self.folder / f"{name}.log")
        daemon.start()
        self.daemons[name] = daemon
        return daemon

    def kill(self, name: str) -> None:
        """Kills one of its programs, whose children stay."""
        daemon = self.daemons.pop(name)
        subprocess.run(["kill", "-KILL", *_children(daemon.pid)], check=True)
        daemon.kill()

    def run(self, *command: str) -> str:
        """What the command prints that is run in it. Raises DaemonError when it fails."""
        return run(*self._enter(), *command)

    def _enter(self) -> list[str]:
        return ["nsenter", f"--target={self._pid()}", "--net", "--mount", "--pid", "--"]

    def _pid(self) -> str:
        """The first process, as it is numbered outside."""
        assert self._first is not None, f"{self.name} is off"
        (pid,) = _children(self._first.pid)
        return pid

    def _wait_for_link(self) -> None:
        assert self._first is not None
        deadline = time.monotonic() + START_SECONDS
        while True:
            self._first.check()
            if _children(self._first.pid) and "state UNKNOWN" in self._links():
                return
            if time.monotonic() > deadline:
                raise DaemonError(f"{self.name} did not start:\n{self._first.tail()}")
            time.sleep(0.02)

    def _links(self) -> str:
        """Of loopback `UNKNOWN` means up, which is the last thing before its first process."""
        enter = ["nsenter", f"--target={self._pid()}", "--net", "ip", "link", "show", "lo"]
        return subprocess.run(enter, capture_output=True, text=True, check=False).stdout

    def _connect(self) -> None:
        ours = f"to-{self.name}"
        run("ip", "link", "add", ours, "type", "veth", "peer", "name", "eth0", "netns", self._pid())
        run("ip", "link", "set", ours, "master", BRIDGE, "up")
        run("ip", "route", "replace", self.pods, "via", self.address)
        self.run("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        self.run("ip", "route", "add", "default", "via", HERE)
        self.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")


def _children(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()
    except FileNotFoundError:
        return []
