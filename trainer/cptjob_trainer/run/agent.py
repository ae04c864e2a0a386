"""The elastic agent: starts this node's workers, watches them, restarts them in place, stops them.

torch's SimpleElasticAgent keeps the rendezvous and the restart loop. Its stock subclass is not
used: it flattens exit codes, waits hard-coded 30 s for the peers of a dead worker, and answers
SIGTERM with a kill that leaves no time to save. Imports torch.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.events.api import Event, EventSource
from torch.distributed.elastic.rendezvous.api import RendezvousHandler
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)

from cptjob_trainer import store, temporary, termination
from cptjob_trainer.errors import NEVER_RETRIED
from cptjob_trainer.run import forkserver
from cptjob_trainer.termination import STOPPED, Termination
from cptjob_trainer.words import counted

# torch's defaults of 30 s and more would be most of the time that a restart takes.
LAST_CALL_SECONDS = 2
CLOSE_SECONDS = 5
HEARTBEAT_SECONDS = 5
KEEP_ALIVE_INTERVAL_SECONDS = 1
KEEP_ALIVE_ATTEMPTS = 3
EXIT_BARRIER_SECONDS = 30
MONITOR_INTERVAL_SECONDS = 0.1

#: How long the peers of a failed worker have to fail by themselves and say how, and then to end
#: after SIGTERM, before SIGKILL.
PEER_SECONDS = 3.0


class StopRequested(BaseException):
    """A stop was asked for while no worker runs that could save anything."""


@dataclass
class _Worker:
    rank: int
    process: ForkServerProcess
    message: Path

    def termination(self) -> Termination | None:
        """How the worker ended; None while it runs."""
        code = self.process.exitcode
        if code is None:
            return None
        said = termination.read(self.message)
        if said is not None and said.exit_code == code:
            return said
        if code < 0:
            return termination.from_signal(-code, self.rank)
        message = f"rank {self.rank} ended with exit code {code} and left no message"
        return Termination(code, "Exit", message if code else "", self.rank, time.time())


@dataclass(frozen=True)
class AgentSettings:
    """What an agent must know beside the rendezvous."""

    entrypoint: str  # "module:function"; the function gets config_path
    config_path: str
    local_address: str
    grace_seconds: float
    environment: dict[str, str]  # added to every worker's environment


def rendezvous(
    host: TCPStore, run_id: str, nodes: int, local_address: str, join_seconds: float
) -> RendezvousHandler:
    """A rendezvous of exactly ``nodes`` agents in the coordinator's store."""
    handler: RendezvousHandler = DynamicRendezvousHandler.from_backend(
        run_id,
        host,
        C10dRendezvousBackend(host, run_id),
        min_nodes=nodes,
        max_nodes=nodes,
        local_addr=local_address,
        timeout=RendezvousTimeout(
            join=timedelta(seconds=join_seconds),
            last_call=timedelta(seconds=LAST_CALL_SECONDS),
            close=timedelta(seconds=CLOSE_SECONDS),
            heartbeat=timedelta(seconds=HEARTBEAT_SECONDS),
        ),
        keep_alive_interval=KEEP_ALIVE_INTERVAL_SECONDS,
        keep_alive_max_attempt=KEEP_ALIVE_ATTEMPTS,
    )
    return handler


class Agent(SimpleElasticAgent):
    """Runs the workers of one node. After `run`, ``termination`` says how they ended."""

    def __init__(
        self,
        handler: RendezvousHandler,
        processes: int,
        max_restarts: int,
        settings: AgentSettings,
        said_by_others: Callable[[], Termination | None] = lambda: None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``said_by_others`` tells how the job ended when another launcher has ended it; ``warn``
        takes what the person should know while the job goes on.
        """
        spec = WorkerSpec(
            role="trainer",
            local_world_size=processes,
            rdzv_handler=handler,
            entrypoint=settings.entrypoint,
            max_restarts=max_restarts,
            monitor_interval=MONITOR_INTERVAL_SECONDS,
            local_addr=settings.local_address,
        )
        super().__init__(spec, exit_barrier_timeout=EXIT_BARRIER_SECONDS)
        self.termination: Termination | None = None
        self.restarts = 0
        self.stop_requested = False
        self._settings = settings
        self._workers: list[_Worker] = []
        self._workers_may_run = False
        self._store_of_workers: TCPStore | None = None
        self._stop_forwarded = False
        self._kill_at = float("inf")
        self._starts = 0
        self._said_by_others = said_by_others
        self._warn = warn
        self._next_question = 0.0

    # --- stopping -----------------------------------------------------------------------------

    def handle_signal(self, number: int, _frame: FrameType | None = None) -> None:
        """Handler of SIGTERM and SIGINT. The second SIGINT does not wait for the workers."""
        if self.termination is not None and self.termination.exit_code == 0:
            return  # all workers have ended well: nothing is left to stop
        if self.stop_requested and number == signal.SIGINT:
            self._kill_at = time.monotonic()
        self.stop_requested = True
        if not self._workers_may_run:
            raise StopRequested

    def _forward_stop(self) -> None:
        """Asks the workers to save and stop, once; kills those that take longer than the grace."""
        now = time.monotonic()
        if not self._stop_forwarded:
            self._stop_forwarded = True
            self._kill_at = min(self._kill_at, now + self._settings.grace_seconds)
            _say(
                f"stopping: {counted(len(self._workers), 'worker is', 'workers are')} asked to save"
            )
            self._signal_workers(signal.SIGTERM)
        elif now >= self._kill_at:
            self._signal_workers(signal.SIGKILL)

    def _signal_workers(self, number: signal.Signals) -> None:
        for worker in self._workers:
            if worker.process.exitcode is None and worker.process.pid is not None:
                with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                    os.kill(worker.process.pid, number)

    def _end_workers(self, number: signal.Signals, seconds: float) -> None:
        """Sends ``number``, SIGKILL after ``seconds``, and returns when no worker runs."""
        self._signal_workers(number)
        if not self._join(seconds):
            self._signal_workers(signal.SIGKILL)
            # A process in uninterruptible sleep cannot be killed; the launcher ends nevertheless.
            self._join(PEER_SECONDS)
        self._workers_may_run = False

    def _join(self, seconds: float) -> bool:
        """Waits until all workers ended; False when ``seconds`` passed first."""
        deadline = time.monotonic() + seconds
        for worker in self._workers:
            while worker.process.exitcode is None:
                left = min(deadline, self._kill_at) - time.monotonic()
                if left <= 0:
                    return False
                worker.process.join(min(left, 0.2))
        return True

    def _stop_workers(self, worker_group: WorkerGroup, *_args: Any, **_kwargs: Any) -> None:
        # Called before a restart: some worker here or on another node is dead, so that those which
        # still run cannot save together.
        self._end_workers(signal.SIGTERM, PEER_SECONDS)

    def _shutdown(
        self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 0, **_kwargs: Any
    ) -> None:
        self._end_workers(death_sig, self._settings.grace_seconds)

    # --- starting -----------------------------------------------------------------------------

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        if self.stop_requested:
            raise StopRequested
        super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._workers_may_run = True
        self._starts += 1
        self._workers = []
        master = self._meet_in_store(worker_group)
        for worker in worker_group.workers:
            message = temporary.directory() / f"{self._starts}-{worker.global_rank}.json"
            environment = {
                **self._settings.environment,
                **master,
                "RANK": str(worker.global_rank),
                "WORLD_SIZE": str(worker.world_size),
                "LOCAL_RANK": str(worker.local_rank),
                "LOCAL_WORLD_SIZE": str(worker_group.spec.local_world_size),
                "GROUP_RANK": str(worker_group.group_rank),
                "GROUP_WORLD_SIZE": str(worker_group.group_world_size),
                "TORCHELASTIC_RESTART_COUNT": str(self.restarts),
                "TORCHELASTIC_MAX_RESTARTS": str(worker_group.spec.max_restarts),
                "TORCHELASTIC_RUN_ID": worker_group.spec.rdzv_handler.get_run_id(),
                termination.LOG_VARIABLE: str(message),
            }
            process = forkserver.spawn(
                self._settings.entrypoint, self._settings.config_path, environment
            )
            self._workers.append(_Worker(worker.global_rank, process, message))
        return {index: worker.process.pid for index, worker in enumerate(self._workers)}

    def _meet_in_store(self, worker_group: WorkerGroup) -> dict[str, str]:
        """The store in which the workers of this start meet, as their environment.

        The agent with group rank 0 hosts a fresh one for each start: in a store used before, a
        restarted worker would find the addresses of its dead predecessors.
        """
        shared: Any = worker_group.store  # prefixed: its keys are those of this rendezvous round
        group_rank: Any = worker_group.group_rank
        if group_rank == 0:
            address = self._settings.local_address
            self._store_of_workers = store.host(address, 0)
            shared.set("cptjob/master", f"{address} {self._store_of_workers.port}")
        address, port = shared.get("cptjob/master").decode().split()
        return {
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }

    # --- watching -----------------------------------------------------------------------------

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self.stop_requested:
            self._forward_stop()
        elif (said := self._ask_others()) is not None:
            self._end_workers(signal.SIGTERM, PEER_SECONDS)
            self.termination = said
            self._remaining_restarts = 0
            return RunResult(state=WorkerState.FAILED)
        ended = [worker.termination() for worker in self._workers]
        failed = any(end is not None and end.exit_code not in (0, STOPPED) for end in ended)
        if failed and not self.stop_requested:
            return self._conclude_failure()
        if any(end is None for end in ended):
            return RunResult(state=WorkerState.HEALTHY)
        if all(end is not None and end.exit_code == 0 for end in ended):
            self.termination = Termination(0, "Complete", "", time=time.time())
            self._workers_may_run = False
            return RunResult(
                state=WorkerState.SUCCEEDED,
                return_values={worker.rank: None for worker in self._workers},
            )
        return self._conclude_failure()

    def _ask_others(self) -> Termination | None:
        """At most once a second: how the job ended, if another launcher has ended it in failure."""
        if self._worker_group.group_world_size == 1 or time.monotonic() < self._next_question:
            return None
        self._next_question = time.monotonic() + 1.0
        said = self._said_by_others()
        return said if said is not None and said.exit_code != 0 else None

    def _conclude_failure(self) -> RunResult:
        """Ends what still runs, finds the root cause, and decides whether a restart may help."""
        self._join(PEER_SECONDS)
        # Taken before the rest is killed: who must be killed did not fail by itself.
        ends = (end for worker in self._workers if (end := worker.termination()))
        root = termination.root_cause(ends, stop_asked=self.stop_requested)
        self._end_workers(signal.SIGTERM, PEER_SECONDS)
        assert root is not None
        if self.stop_requested and root.exit_code == 128 + signal.SIGTERM:
            # It had not yet begun to listen for the signal, so there was nothing to save.
            root = Termination(STOPPED, "Stopped", root.message, root.rank, root.time)
        self.termination = root
        if self.stop_requested or root.exit_code in NEVER_RETRIED or root.exit_code == STOPPED:
            self._remaining_restarts = 0
        elif self._remaining_restarts > 0:
            self.restarts += 1
            total = self._worker_group.spec.max_restarts
            _say(
                f"{root.message}\nrestarting the workers in place ({self.restarts} of {total})",
            )
            self._warn(
                f"{root.message}; the workers are restarted and go on from what was saved last "
                f"(restart {self.restarts} of {total})"
            )
        return RunResult(state=WorkerState.FAILED)

    def _construct_event(
        self, state: str, source: EventSource, *_args: Any, **_kwargs: Any
    ) -> Event:
        # torch looks up the host's full name for each event: a wait for DNS that nobody needs.
        return Event(name=state, source=source, metadata={})


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
