"""What a job says about itself while it runs, and how it is served.

Rank 0 publishes a `Progress` into the coordinator's store; the coordinator serves the newest at
`/progress` (JSON) and `/metrics` (Prometheus). Nothing here imports torch until a store is used.
"""

import json
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

Phase = Literal[
    "Preparing", "Loading", "Evaluating", "Training", "Saving", "Complete", "Failed", "Stopped"
]
PHASES: tuple[Phase, ...] = Phase.__args__  # type: ignore[attr-defined]

#: The key in the coordinator's store that rank 0 sets.
STORE_KEY = "progress"


def _now() -> datetime:
    return datetime.now(UTC)


class _Value(BaseModel):
    model_config = ConfigDict(
        frozen=True, alias_generator=to_camel, populate_by_name=True, ser_json_inf_nan="null"
    )


class CheckpointRef(_Value):
    """A complete checkpoint: the step it holds, when it was complete, where it lies."""

    step: int
    time: datetime
    uri: str


class Resolved(_Value):
    """What only the model and the data decide, by the names of the API's ``status.resolved``."""

    max_length: int
    batch_size_per_device: int
    global_batch_size: int
    warmup_steps: int
    total_steps: int
    digest: str


class NodeRanks(_Value):
    """A node and the ranks of the processes on it."""

    name: str
    ranks: tuple[int, ...]


class Progress(_Value):
    """One report. Times are UTC; ``metrics`` holds the newest values (loss, learningRate, ...)."""

    phase: Phase = "Preparing"
    message: str = ""
    current_step: int = 0
    total_steps: int | None = None
    epoch: float = 0.0
    progress_percentage: float = 0.0
    estimated_remaining_seconds: float | None = None
    tokens_per_second: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    last_checkpoint: CheckpointRef | None = None
    nodes: tuple[NodeRanks, ...] = ()
    resolved: Resolved | None = None
    last_updated_time: datetime = Field(default_factory=_now)

    def to_json(self) -> bytes:
        """JSON with the names of the API's ``trainerStatus``; NaN and infinities become null."""
        finite = {name: value for name, value in self.metrics.items() if math.isfinite(value)}
        return self.model_copy(update={"metrics": finite}).model_dump_json(by_alias=True).encode()


class StorePublisher:
    """Publishes progress into the store at ``host_port`` ("host:port"), from a thread of its own.

    `publish` never waits: only the newest report is kept when the store is slow, and a lost store
    costs reports, never training.
    """

    _TIMEOUT_SECONDS = 1.0

    def __init__(self, host_port: str) -> None:
        self._host_port = host_port
        self._changed = threading.Condition()
        self._pending: Progress | None = None
        self._idle = True
        self._closed = False
        self._store: Any = None
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def publish(self, progress: Progress) -> None:
        """Hands the report over; returns at once."""
        with self._changed:
            self._pending = progress
            self._idle = False
            self._changed.notify_all()

    def close(self) -> None:
        """Waits, at most a second, until the newest report is out."""
        with self._changed:
            self._changed.wait_for(lambda: self._idle, timeout=self._TIMEOUT_SECONDS)
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending is not None or self._closed)
                progress, self._pending = self._pending, None
            if progress is None:
                return
            self._send(progress)
            with self._changed:
                self._idle = self._pending is None
                self._changed.notify_all()

    def _send(self, progress: Progress) -> None:
        from cptjob_trainer import store

        try:
            if self._store is None:
                self._store = store.connect(self._host_port, self._TIMEOUT_SECONDS)
            self._store.set(STORE_KEY, progress.to_json())
        except RuntimeError:  # torch's store errors; the next report tries a new connection
            self._store = None


class _MetricsCollector(Collector):
    """Turns the newest report into Prometheus samples when they are asked for."""

    def __init__(self, current: Callable[[], Progress]) -> None:
        self._current = current

    def collect(self) -> Iterator[Metric]:
        progress = self._current()
        yield from _gauges(progress)
        phases = GaugeMetricFamily("cptjob_phase", "1 for the current phase", labels=["phase"])
        for phase in PHASES:
            phases.add_metric([phase], 1.0 if phase == progress.phase else 0.0)
        yield phases
        metrics = GaugeMetricFamily("cptjob_metric", "Newest value of a metric", labels=["name"])
        for name, value in progress.metrics.items():
            metrics.add_metric([name], value)
        yield metrics


def _gauges(progress: Progress) -> Iterator[Metric]:
    checkpoint = progress.last_checkpoint
    values: list[tuple[str, str, float | None]] = [
        ("cptjob_step", "Optimizer steps done", progress.current_step),
        ("cptjob_steps", "Optimizer steps of the whole job", progress.total_steps),
        ("cptjob_epoch", "Passes over the domain data", progress.epoch),
        ("cptjob_progress_ratio", "Part of the job done, 0..1", progress.progress_percentage / 100),
        ("cptjob_tokens_per_second", "Tokens trained per second", progress.tokens_per_second),
        (
            "cptjob_estimated_remaining_seconds",
            "Time left at the present speed",
            progress.estimated_remaining_seconds,
        ),
        (
            "cptjob_checkpoint_step",
            "Step of the last checkpoint",
            checkpoint.step if checkpoint else None,
        ),
        (
            "cptjob_checkpoint_timestamp_seconds",
            "When the last checkpoint was complete",
            checkpoint.time.timestamp() if checkpoint else None,
        ),
        (
            "cptjob_last_update_timestamp_seconds",
            "When the trainer last reported",
            progress.last_updated_time.timestamp(),
        ),
    ]
    for name, text, value in values:
        if value is not None:
            yield GaugeMetricFamily(name, text, value=value)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the client did not wait
            super().handle_error(request, client_address)


class ProgressServer:
    """Serves /progress, /warnings, /metrics, /healthz and /readyz on ``host:port`` (port 0: any free one)."""

    def __init__(self, host: str, port: int) -> None:
        self._lock = threading.Lock()
        self._progress = Progress()
        self._resolved: Resolved | None = None
        self._ready = False
        self._warnings: tuple[str, ...] = ()
        registry = CollectorRegistry()
        registry.register(_MetricsCollector(self.current))
        self._registry = registry
        self._server = _Server((host, port), self._handler())
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="http", daemon=True).start()

    def current(self) -> Progress:
        with self._lock:
            return self._progress.model_copy(update={"resolved": self._resolved})

    def update(self, progress: Progress) -> None:
        with self._lock:
            self._progress = progress

    def set_resolved(self, resolved: Resolved) -> None:
        """From now on every report says what was decided, whoever made it."""
        with self._lock:
            self._resolved = resolved

    def set_warnings(self, lines: Iterable[str]) -> None:
        """All that a person is warned of so far, a line each."""
        self._warnings = tuple(lines)

    def set_ready(self) -> None:
        """From now on /readyz answers 200: the data is prepared and the store is there."""
        self._ready = True

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, path: str) -> tuple[int, str, bytes]:
        """Status, content type and body of a GET."""
        match path.partition("?")[0]:
            case "/progress":
                return 200, "application/json", self.current().to_json()
            case "/warnings":
                return 200, "application/json", json.dumps(self._warnings).encode()
            case "/metrics":
                return 200, CONTENT_TYPE_LATEST, generate_latest(self._registry)
            case "/healthz":
                return 200, "text/plain", b"ok\n"
            case "/readyz":
                return (
                    (200, "text/plain", b"ok\n")
                    if self._ready
                    else (503, "text/plain", b"preparing\n")
                )
        return 404, "text/plain", b"not found\n"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        answer = self._answer

        class Handler(BaseHTTPRequestHandler):
            timeout = 10  # seconds a client may take to send its request

            def do_GET(self) -> None:
                status, content_type, body = answer(self.path)
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass  # a scrape every few seconds would bury the log

        return Handler
