"""Starts a node's training processes and answers for how they end.

    python -m cptjob_trainer.run.launch --config CONFIG.json --store HOST:PORT

The exit code and the termination message are those of the worker that failed first. Nothing heavy
is imported at the top: workers import this module again, and the fork server is to start first.
"""

import argparse
import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from cptjob_trainer import lifeline, temporary, termination
from cptjob_trainer.config import AcceptedConfig
from cptjob_trainer.errors import CoordinatorLostError, GangError, Stopped, UsageError
from cptjob_trainer.locks import OutputLock
from cptjob_trainer.run import forkserver
from cptjob_trainer.termination import STOPPED, Termination

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

    from cptjob_trainer.run.agent import Agent

ENTRYPOINT = "cptjob_trainer.run.worker:main"

#: How long launchers wait for the others of the gang.
JOIN_SECONDS = 600
STORE_TIMEOUT_SECONDS = 15.0


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the launcher process."""
    options = _parse(arguments)
    try:
        with termination.guard():
            ended = _launch(options)
    except SystemExit as exit_:
        _leave(exit_.code)
    if ended.exit_code != 0:
        prefix = "" if ended.exit_code == STOPPED else "error: "
        print(f"{prefix}{ended.message}", file=sys.stderr)
        termination.write(ended)
    _leave(ended.exit_code)


def _leave(code: str | int | None) -> NoReturn:
    """Not sys.exit: it would wait for threads of the rendezvous, and abort one in a store call."""
    sys.stdout.flush()
    sys.stderr.flush()
    temporary.remove()
    os._exit(code if isinstance(code, int) else 1)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cptjob_trainer.run.launch", description=__doc__)
    parser.add_argument("--config", required=True, help="AcceptedConfig as JSON")
    parser.add_argument(
        "--store", required=True, help="HOST:PORT, or @FILE that the coordinator writes it to"
    )
    parser.add_argument("--nnodes", type=int, help="default: processes.numNodes")
    parser.add_argument("--nproc-per-node", type=int, help="default: processes.numProcPerNode")
    parser.add_argument(
        "--lock-output", action="store_true", help="hold the output's file lock (local runs)"
    )
    parser.add_argument("--run-id", help="default: the job's uid")
    parser.add_argument("--entrypoint", default=ENTRYPOINT, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


class _StopBeforeAgent(BaseException):
    """A stop was asked for before there was an agent to ask."""


def _launch(options: argparse.Namespace) -> Termination:
    parent_lives = lifeline.follow_parent(signal.SIGTERM)
    signal.signal(signal.SIGTERM, _stop_early)
    signal.signal(signal.SIGINT, _stop_early)
    try:
        if not parent_lives:
            raise _StopBeforeAgent
        config = AcceptedConfig.load(options.config)
        nodes = options.nnodes or config.processes.num_nodes
        processes = options.nproc_per_node or config.processes.num_proc_per_node
        _set_environment(nodes, processes)
        if options.lock_output:
            OutputLock(config.paths.output, config.uid).acquire()
        address = ""
        if (config.paths.output / "manifest.json").exists():
            # The coordinator may find that nothing is left to do.
            address = _wait_for_address(options.store)
        temporary.directory()
        forkserver.start(options.entrypoint)
        address = address or _wait_for_address(options.store)
        # Imports torch, while the server does too.
        from cptjob_trainer.run.agent import StopRequested
    except _StopBeforeAgent:
        raise Stopped("stopped before training began; the same command starts it again") from None
    try:
        return _run_agent(options, config, nodes, processes, address)
    except (StopRequested, _StopBeforeAgent):
        raise Stopped("stopped while no worker ran; the same command continues") from None


def _ignore_stops() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stop_early(_number: int, _frame: FrameType | None) -> None:
    raise _StopBeforeAgent


def _set_environment(nodes: int, processes: int) -> None:
    """What must be in the environment before the fork server imports torch."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // processes)))
    # torch.cuda.is_available() would otherwise initialise CUDA, which no fork survives.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The agent hosts the workers' store itself.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if nodes == 1:
        # One machine talks to itself; its host name need not resolve to anything.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def available_cores() -> int:
    """Cores this process may use, by affinity and by the container's limit."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def _wait_for_address(where: str) -> str:
    """host:port of a store that accepts connections. Waits for ever: preparing may take hours."""
    while True:
        address = where
        if where.startswith("@"):
            try:
                address = Path(where[1:]).read_text().strip()
            except OSError:
                address = ""
        if address and _accepts(address):
            return address
        time.sleep(0.1)


def _accepts(address: str) -> bool:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--store: {address!r} is not HOST:PORT")
    try:
        with socket.create_connection((host, int(port)), timeout=1.0):
            return True
    except OSError:
        return False


def _run_agent(
    options: argparse.Namespace, config: AcceptedConfig, nodes: int, processes: int, address: str
) -> Termination:
    from torch.distributed.elastic.rendezvous import RendezvousError

    from cptjob_trainer import store
    from cptjob_trainer.run.agent import Agent, AgentSettings, rendezvous

    lost = f"the coordinator at {address} is gone; its log says why. Run the job again to continue"
    try:
        client = store.connect(address, STORE_TIMEOUT_SECONDS)
        prepared = _wait_for_key(client, store.PREPARED_KEY)
        local_address = "127.0.0.1" if nodes == 1 else _address_towards(address)
        run_id = options.run_id or config.uid
        handler = rendezvous(client, run_id, nodes, local_address, JOIN_SECONDS)
    except (RendezvousError, RuntimeError, OSError) as error:
        raise CoordinatorLostError(lost) from error

    settings = AgentSettings(
        entrypoint=options.entrypoint,
        config_path=options.config,
        local_address=local_address,
        grace_seconds=config.checkpoint.grace_period_seconds,
        environment={"CPTJOB_STORE": address, "CPTJOB_PREPARED": prepared},
    )
    agent = Agent(
        handler,
        processes,
        config.elastic.max_restarts,
        settings,
        said_by_others=lambda: _said_by_others(client, run_id),
        warn=lambda text: store.warn(client, text),
    )
    signal.signal(signal.SIGTERM, agent.handle_signal)
    signal.signal(signal.SIGINT, agent.handle_signal)
    try:
        ended = _outcome(agent, client, run_id, lost)
    finally:
        # How the job ended is known; to tell it takes no time and is not to be stopped.
        _ignore_stops()
        threading.Thread(target=handler.shutdown, daemon=True).start()
    _announce(client, run_id, ended)
    return ended


def _outcome(agent: "Agent", client: "TCPStore", run_id: str, lost: str) -> Termination:
    """Runs the agent to its end; how it ended."""
    from torch.distributed.elastic.rendezvous import (
        RendezvousClosedError,
        RendezvousConnectionError,
        RendezvousTimeoutError,
    )

    try:
        agent.run()
    except RendezvousClosedError:
        return _said_by_others(client, run_id) or Termination(
            GangError.exit_code, "GangError", "another launcher closed the job", time=time.time()
        )
    except RendezvousTimeoutError as error:
        raise GangError(f"not all launchers came within {JOIN_SECONDS} s") from error
    except (RendezvousConnectionError, RuntimeError) as error:
        if isinstance(error, RendezvousConnectionError) or not _alive(client):
            raise CoordinatorLostError(lost) from error
        raise
    assert agent.termination is not None
    return agent.termination


def _alive(client: "TCPStore") -> bool:
    try:
        client.check(["cptjob/alive"])
        return True
    except RuntimeError:
        return False


def _wait_for_key(client: "TCPStore", key: str) -> str:
    while not client.check([key]):
        time.sleep(0.1)
    return str(client.get(key).decode())


def _said_by_others(client: "TCPStore", run_id: str) -> Termination | None:
    from cptjob_trainer import store

    key = store.done_key(run_id)
    try:
        if client.check([key]):
            return Termination.from_json(client.get(key).decode())
    except (RuntimeError, ValueError):
        pass
    return None


def _announce(client: "TCPStore", run_id: str, ended: Termination) -> None:
    """Tells the launchers that are left, and the coordinator, that this run is over."""
    from cptjob_trainer import store

    with contextlib.suppress(RuntimeError):  # the coordinator may be gone already
        client.set(store.done_key(run_id), ended.to_json())
        client.set(store.DONE_KEY, ended.to_json())


def _address_towards(address: str) -> str:
    """This machine's address on the way to ``address``."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5.0) as connection:
        return str(connection.getsockname()[0])


if __name__ == "__main__":
    main()
