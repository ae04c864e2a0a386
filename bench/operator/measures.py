"""What is measured. Each function returns plain figures in seconds; report.py puts them into words."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from arms import Arm, Ours, Plain, create_all
from driver import COORDINATOR, PODS, Client, Pods
from stage import FLEET, STILL, Load, Measured, Stage

WORKERS = 4
WORKER = "worker"
_PAUSE_SECONDS = 0.7


@dataclass
class Sides:
    ours: Ours
    plain: Plain
    operator: Measured
    client: Client

    async def alike(self) -> Plain:
        """Made from a worker that the operator makes."""
        self.ours.eager = True
        await self.ours.create("like-this", WORKERS)
        await self.ours.pods.until(lambda: self.ours.pods.of_job["like-this", WORKER] == WORKERS)
        name = self.ours.pods.names["like-this", WORKER][0]
        worker = await self.client.ask("GET", f"{PODS.format(self.ours.namespace)}/{name}")
        self.ours.eager = False
        await self.ours.clear()
        worker["spec"].pop("nodeName", None)
        return Plain(self.client, self.plain.namespace, self.plain.pods, worker["spec"])


@contextlib.asynccontextmanager
async def sides(
    stage: Stage, operator: Measured, namespaces: tuple[str, str] = STILL
) -> AsyncIterator[Sides]:
    """Both arms, each in its namespace, watched."""
    for_ours, for_plain = namespaces
    async with (
        Client(stage.plane) as client,
        client.pods(for_ours) as ours,
        client.pods(for_plain) as plain,
        asyncio.TaskGroup() as group,
    ):
        yield Sides(
            Ours(client, for_ours, ours, group), Plain(client, for_plain, plain), operator, client
        )


async def settled(operator: Measured) -> None:
    """No pass is due or under way, and a while later no write has been added."""
    before = -1.0
    for _ in range(200):
        figures = await asyncio.to_thread(operator.figures)
        passes = figures["cptjob_queue_depth"] + figures["cptjob_passes_active"]
        now = await asyncio.to_thread(operator.writes)
        if passes == 0 and now == before:
            return
        before = now
        await asyncio.sleep(1.5)
    raise TimeoutError("the operator does not come to rest")


# --- one job at a time ---


@dataclass
class Latencies:
    coordinator: list[float] = field(default_factory=list)
    workers: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)


async def latencies(at: Sides, count: int) -> Latencies:
    """Creation to coordinator, readiness to all workers; a plain Job in turn with each."""
    found = Latencies()
    for number in range(-2, count):  # two to warm up
        ours, plain = await _one_of_ours(at, f"one-{number + 2}"), 0.0
        plain = await _one_plain(at, f"one-{number + 2}")
        if number >= 0:
            found.coordinator.append(ours[0])
            found.workers.append(ours[1])
            found.plain.append(plain)
    await at.ours.clear()
    await at.plain.clear()
    return found


async def _one_of_ours(at: Sides, job: str) -> tuple[float, float]:
    arm, pods = at.ours, at.ours.pods
    begun = time.perf_counter()
    await arm.create(job, WORKERS)
    there = await pods.until(lambda: pods.of_job[job, COORDINATOR] == 1)
    await asyncio.sleep(_PAUSE_SECONDS)  # one job at rest, not one whose status is being written
    ready = time.perf_counter()
    await arm.make_ready(pods.names[job, COORDINATOR][0])
    done = await pods.until(lambda: pods.of_job[job, WORKER] == WORKERS)
    await asyncio.sleep(_PAUSE_SECONDS)
    return there - begun, done - ready


async def _one_plain(at: Sides, job: str) -> float:
    begun, pods = time.perf_counter(), at.plain.pods
    await at.plain.create(job, WORKERS)
    done = await pods.until(lambda: pods.of_job[job, ""] == WORKERS + 1)
    await asyncio.sleep(_PAUSE_SECONDS / 2)
    return done - begun


# --- many at once ---


@dataclass
class Burst:
    """One round of one arm.

    cores: how many were busy. others: of them, with other programs' work. cpu: see Measured.cpu.
    """

    jobs: int
    seconds: float
    cores: float
    others: float
    cpu: tuple[float, float, float]
    passes: float = 0.0
    calls: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.jobs / self.seconds


async def burst(at: Sides, arm: Arm, jobs: int) -> Burst:
    """From the first creation until every pod exists."""
    pods = arm.pods  # type: ignore[attr-defined]
    at.ours.eager = True
    already, wanted = len(pods.made), jobs * arm.pods_of(WORKERS)
    calls, passes = at.operator.calls(), at.operator.passes()
    before = at.operator.cpu()
    with Load() as load:
        begun = time.perf_counter()
        creating = asyncio.create_task(
            create_all(arm, [f"many-{jobs}-{number}" for number in range(jobs)], WORKERS)
        )
        done = await pods.until(lambda: len(pods.made) - already >= wanted)
        await creating
        operator, api, rest = (
            now - then for now, then in zip(at.operator.cpu(), before, strict=True)
        )
    found = Burst(jobs, done - begun, load.cores, load.others, (operator, api, rest))
    found.passes = (at.operator.passes() - passes) / jobs
    found.calls = per_job(calls, at.operator.calls(), jobs)
    at.ours.eager = False
    await arm.clear()
    await settled(at.operator)
    return found


async def gang(at: Sides, workers: int) -> float:
    """Seconds for all workers of one job, from its readiness."""
    pods, job = at.ours.pods, f"large-{len(at.ours.pods.made)}"
    await at.ours.create(job, workers)
    await pods.until(lambda: pods.of_job[job, COORDINATOR] == 1)
    await settled(at.operator)
    ready = time.perf_counter()
    await at.ours.make_ready(pods.names[job, COORDINATOR][0])
    seconds = await pods.until(lambda: pods.of_job[job, WORKER] >= workers) - ready
    await at.ours.clear()
    await settled(at.operator)
    return seconds


async def plain_gang(arm: Plain, workers: int) -> float:
    """Seconds for all pods of one plain Job, from its creation."""
    pods, job = arm.pods, f"large-{len(arm.pods.made)}"
    begun = time.perf_counter()
    await arm.create(job, workers - 1)
    seconds = await pods.until(lambda: pods.of_job[job, ""] >= workers) - begun
    await arm.clear()
    return seconds


# --- a pod is lost ---


@dataclass
class Replacements:
    failed: list[float] = field(default_factory=list)
    deleted: list[float] = field(default_factory=list)
    plain_failed: list[float] = field(default_factory=list)
    plain_deleted: list[float] = field(default_factory=list)


async def replacements(at: Sides, count: int) -> Replacements:
    """A worker of a running job fails or is deleted; each job loses one, so no back-off is due."""
    found = Replacements()
    names = [f"lossy-{number}" for number in range(2 * count)]
    await _run(at, names)
    for number, job in enumerate(names):
        kind = found.failed if number % 2 else found.deleted
        pod = at.ours.pods.names[job, WORKER][1]
        kind.append(await _lose(at, at.ours, job, WORKER, pod, WORKERS, failing=bool(number % 2)))
        await asyncio.sleep(_PAUSE_SECONDS / 2)
    await at.ours.clear()
    await _plain_replacements(at, min(3, count), found)
    return found


async def _plain_replacements(at: Sides, count: int, found: Replacements) -> None:
    for number in range(2 * count):
        await at.plain.create(f"lossy-{number}", WORKERS)
    pods = at.plain.pods
    total = WORKERS + 1

    async def one(number: int) -> None:
        job = f"lossy-{number}"
        await pods.until(lambda: pods.of_job[job, ""] == total)
        await asyncio.sleep(2.0)
        failing = bool(number % 2)
        kind = found.plain_failed if failing else found.plain_deleted
        pod = pods.names[job, ""][1]
        kind.append(await _lose(at, at.plain, job, "", pod, total, failing=failing))

    await asyncio.gather(*(one(number) for number in range(2 * count)))
    await at.plain.clear()


async def _lose(
    at: Sides, arm: Any, job: str, role: str, pod: str, before: int, *, failing: bool
) -> float:
    begun = time.perf_counter()
    if failing:
        status = {"phase": "Failed", "conditions": [{"type": "Ready", "status": "False"}]}
        await at.client.patch_pod(arm.namespace, pod, status)
    else:
        path = f"{PODS.format(arm.namespace)}/{pod}"
        await at.client.ask("DELETE", path, {"gracePeriodSeconds": 0})
    return await arm.pods.until(lambda: arm.pods.of_job[job, role] > before) - begun


async def _run(at: Sides, names: list[str]) -> None:
    """Makes these jobs and brings all their pods up."""
    at.ours.eager = True
    pods = at.ours.pods
    await create_all(at.ours, names, WORKERS)
    await pods.until(lambda: all(pods.of_job[job, WORKER] >= WORKERS for job in names))
    at.ours.eager = False
    for job in names:
        for pod in pods.names[job, WORKER]:
            await at.ours.make_ready(pod)
    await _until_phase(at, names, "Running")
    await settled(at.operator)


async def _until_phase(at: Sides, names: list[str], phase: str) -> None:
    async with asyncio.timeout(120):
        for job in names:
            while await at.ours.phase(job) != phase:
                await asyncio.sleep(0.1)


# --- requests ---


async def calls(at: Sides, count: int) -> dict[str, float]:
    """Requests of the operator for one job from creation to completion, by verb and kind."""
    before, passes = at.operator.calls(), at.operator.passes()
    names = [f"whole-{number}" for number in range(count)]
    await _run(at, names)
    for job in names:
        for role in (WORKER, COORDINATOR):  # in the order in which they end
            for pod in at.ours.pods.names[job, role]:
                await at.ours.succeed(pod)
    await _until_phase(at, names, "Complete")
    await settled(at.operator)
    found = per_job(before, at.operator.calls(), count)
    found["passes"] = (at.operator.passes() - passes) / count
    await at.ours.clear()
    return found


def per_job(
    before: dict[tuple[str, str, str], float], after: dict[tuple[str, str, str], float], jobs: int
) -> dict[str, float]:
    """Requests per job by verb and kind; refused ones (a code of 300 or more) stand for themselves."""
    found: Counter[str] = Counter()
    for (verb, kind, code), value in after.items():
        count = value - before.get((verb, kind, code), 0.0)
        if count:
            found[f"{verb} {kind}" + ("" if code.startswith("2") else f" {code}")] += count / jobs
    return dict(sorted(found.items()))


# --- a fleet ---


@dataclass
class Fleet:
    jobs: int
    grown_seconds: float
    others: float
    memory: float = 0.0
    peak: float = 0.0
    idle_seconds: float = 0.0
    idle_cpu: float = 0.0  # of one core
    idle_writes: float = 0.0
    idle_lists: float = 0.0
    restart_seconds: float = 0.0
    restart_cpu: float = 0.0
    restart_writes: float = 0.0
    restart_memory: float = 0.0
    restart_peak: float = 0.0
    strangers: int = 0  # pods that came or went with the restart


async def fleet(stage: Stage, operator: Measured, jobs: int, idle_seconds: float) -> Fleet:
    """Jobs of one coordinator and four workers, all running; idle; then the operator dies."""
    async with (
        Client(stage.plane) as client,
        client.pods(FLEET) as pods,
        asyncio.TaskGroup() as group,
    ):
        arm = Ours(client, FLEET, pods, group)
        with Load() as load:
            begun = time.perf_counter()
            await create_all(arm, [f"fleet-{number}" for number in range(jobs)], WORKERS)
            running = 'cptjob_jobs{phase="Running"}'
            await _until_figure(operator, running, jobs)
            await settled(operator)
        found = Fleet(jobs, time.perf_counter() - begun, load.others)
        found.memory, found.peak = operator.memory()
        await _idle(operator, found, idle_seconds)
        await _restart(operator, found, pods)
        return found


async def _until_figure(operator: Measured, name: str, value: float) -> None:
    async with asyncio.timeout(900):
        while (await asyncio.to_thread(operator.figures)).get(name) != value:
            await asyncio.sleep(1.0)


async def _idle(operator: Measured, found: Fleet, seconds: float) -> None:
    before, cpu, begun = operator.calls(), operator.cpu_seconds(), time.monotonic()
    await asyncio.sleep(seconds)
    found.idle_seconds = time.monotonic() - begun
    found.idle_cpu = (operator.cpu_seconds() - cpu) / found.idle_seconds
    now = per_job(before, operator.calls(), 1)
    found.idle_lists = sum(count for name, count in now.items() if name.startswith("list"))
    found.idle_writes = sum(
        count for name, count in now.items() if not name.startswith(("list", "get"))
    )


async def _restart(operator: Measured, found: Fleet, pods: Pods) -> None:
    operator.kill()
    made, there = len(pods.made), len(pods.there)
    begun = time.perf_counter()
    operator.start()
    # It has looked at every job, leads, and nothing is due.
    async with asyncio.timeout(240):
        while not await asyncio.to_thread(_converged, operator, found.jobs):
            await asyncio.sleep(0.1)
    found.restart_seconds = time.perf_counter() - begun
    found.restart_cpu = operator.cpu_seconds()
    await settled(operator)
    found.restart_writes = operator.writes()
    found.restart_memory, found.restart_peak = operator.memory()
    found.strangers = abs(len(pods.made) - made) + abs(len(pods.there) - there)


def _converged(operator: Measured, jobs: int) -> bool:
    figures = operator.figures()
    return (
        figures.get("cptjob_leader") == 1
        and figures.get("cptjob_queue_depth") == 0
        and figures.get("cptjob_passes_active") == 0
        and operator.passes() >= jobs
    )
