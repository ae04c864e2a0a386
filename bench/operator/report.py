"""The figures in words."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from measures import WORKERS, Burst, Fleet, Latencies, Replacements
from results import table


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least that share of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000 * len(ordered)) // 1000) - 1)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and the range where there are several."""
    middle = f"{median(values):.{digits}f}"
    if len(values) < 2:
        return middle
    return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _judge(good: bool) -> str:
    return "reached" if good else "**not reached**"


def latency(found: Latencies) -> str:
    rows = []
    for name, values, judged in (
        ("creation to coordinator pod", found.coordinator, True),
        (f"coordinator's readiness to all {WORKERS} worker pods", found.workers, True),
        (f"plain Job: creation to all {WORKERS + 1} pods", found.plain, False),
    ):
        half, most = percentile(values, 0.5), percentile(values, 0.99)
        rows.append(
            [
                name,
                str(len(values)),
                f"{half:.3f}",
                f"{most:.3f}",
                "0.08, 0.15: " + _judge(half <= 0.08 and most <= 0.15) if judged else "",
            ]
        )
    return table(["one job at a time", "times", "p50, s", "p99, s", "target"], rows)


#: A round: ours, plain Jobs of the smallest pods, plain Jobs of pods like our workers.
Bursts = tuple[Burst, Burst, Burst]


def bursts(kind: str, found: dict[int, list[Bursts]]) -> str:
    rows = []
    first = median([ours.rate for ours, _, _ in found[min(found)]])
    for jobs, rounds in found.items():
        sides = list(zip(*rounds, strict=True))
        rates = [[each.rate for each in side] for side in sides]
        ratios = [ours.rate / plain.rate for ours, plain, _ in rounds]
        rows.append(
            [
                f"{jobs:,}",
                *(spread(each, 1) for each in rates),
                f"{spread(ratios)}: {_judge(median(ratios) >= 0.7)}",
                spread([ours.rate / like.rate for ours, _, like in rounds]),
                f"{median(rates[0]) / first:.2f}",
                spread([ours.passes for ours in sides[0]], 1),
                "; ".join(cpu(side) for side in sides),
                f"{median([each.cores for pair in rounds for each in pair]):.2f}",
                f"{max(each.others for pair in rounds for each in pair):.2f}",
            ]
        )
    head = [
        f"jobs at once, pods {kind}",
        "jobs/s",
        "plain Jobs/s",
        "plain Jobs/s of the same pods",
        "ratio to plain, target 0.7",
        "ratio to those of the same pods",
        f"of the rate at {min(found)}",
        "passes a job",
        "CPU ms a job, operator + API server + rest of the control plane; plain; of the same pods",
        "busy cores",
        "of them with other load",
    ]
    return table(head, rows)


def cpu(rounds: Iterable[Burst]) -> str:
    """Milliseconds a job of the operator, the API server, and the rest of the control plane."""
    both = [tuple(1000 * each / burst.jobs for each in burst.cpu) for burst in rounds]
    return " + ".join(f"{median(each):.0f}" for each in zip(*both, strict=True))


def gangs(kind: str, workers: int, found: Sequence[tuple[float, float, float]]) -> str:
    """found: seconds of ours, of a plain Job, of a plain Job of the same pods."""
    ratios = [plain / ours for ours, plain, _ in found]
    row = [
        f"{workers}",
        *(spread(list(seconds)) for seconds in zip(*found, strict=True)),
        f"{spread(ratios)}: {_judge(median(ratios) >= 1)}",
        spread([like / ours for ours, _, like in found]),
    ]
    head = [
        f"workers of one job, pods {kind}",
        "from readiness, s",
        "plain Job, s",
        "plain Job of the same pods, s",
        "speed, times the plain Job; target 1",
        "times the one of the same pods",
    ]
    return table(head, [row])


def replaced(found: Replacements) -> str:
    rows = []
    for name, values, plain in (
        ("fails", found.failed, found.plain_failed),
        ("is deleted", found.deleted, found.plain_deleted),
    ):
        most = percentile(values, 0.99)
        rows.append(
            [
                name,
                str(len(values)),
                f"{percentile(values, 0.5):.3f}",
                f"{most:.3f}",
                f"1: {_judge(most <= 1)}",
                spread(plain),
            ]
        )
    head = ["a worker ...", "times", "p50, s", "p99, s", "target for p99", "plain Job, s"]
    return table(head, rows)


#: What each kind of request is for.
REASONS = {
    "create ConfigMap": "what was resolved, which every pod reads",
    "create Event": "what a person sees of it in `kubectl describe`: accepted, running, complete",
    "create NetworkPolicy": "keeps its unauthenticated ports from other pods",
    "create Pod": "the coordinator and each worker",
    "create Service": "the coordinator's name, which outlives its pod",
    "delete Pod": "pods that would hold their nodes for nothing",
    "get PersistentVolumeClaim": "whether a claim is there, before pods wait for it unexplained",
    "patch CPTJob": "accepted and resolved; workers made; all run; complete",
}


def requests(found: dict[str, float]) -> str:
    passes = found.pop("passes")
    rows = [[name, f"{count:.1f}", REASONS.get(name, "")] for name, count in found.items()]
    rows.append(["**all**", f"{sum(found.values()):.1f}", ""])
    head = [f"requests for one job of {WORKERS} workers, creation to completion", "times", "for"]
    return (
        table(head, rows) + f"\n\n{passes:.1f} passes. Claims are read once in 14 s for all jobs."
    )


def fleet(found: Fleet) -> str:
    rows = [
        ["grown in", f"{found.grown_seconds:.0f} s", ""],
        ["memory (RSS)", f"{found.memory:.0f} MiB", f"150: {_judge(found.memory <= 150)}"],
        ["most memory ever", f"{found.peak:.0f} MiB", ""],
        [
            f"idle for {found.idle_seconds:.0f} s ({found.idle_lists:.0f} lists): of a core",
            f"{100 * found.idle_cpu:.1f} %",
            f"5 %: {_judge(found.idle_cpu < 0.05)}",
        ],
        ["writes while idle", f"{found.idle_writes:.0f}", f"0: {_judge(not found.idle_writes)}"],
        [
            "restart until converged",
            f"{found.restart_seconds:.1f} s",
            f"20 s: {_judge(found.restart_seconds <= 20)}",
        ],
        ["processor time of that", f"{found.restart_cpu:.1f} s", ""],
        ["writes of that", f"{found.restart_writes:.0f}", f"0: {_judge(not found.restart_writes)}"],
        ["pods that came or went", f"{found.strangers}", f"0: {_judge(not found.strangers)}"],
        [
            "memory after it; most",
            f"{found.restart_memory:.0f} MiB; {found.restart_peak:.0f} MiB",
            f"150: {_judge(found.restart_memory <= 150)}",
        ],
    ]
    head = [f"{found.jobs:,} coordinators and {found.jobs * WORKERS:,} workers, all running"]
    return table([*head, "", "target"], rows)


def costs(found: Mapping[str, float]) -> str:
    rows = [[name, f"{value:.1f}"] for name, value in found.items()]
    return table(["a request", "API server, CPU ms"], rows)
