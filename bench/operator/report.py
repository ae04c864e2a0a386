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


def bursts(kind: str, found: dict[int, list[tuple[Burst, Burst]]]) -> str:
    rows = []
    first = median([ours.rate for ours, _ in found[min(found)]])
    for jobs, rounds in found.items():
        rates = [ours.rate for ours, _ in rounds]
        ratios = [ours.rate / plain.rate for ours, plain in rounds]
        rows.append(
            [
                f"{jobs:,}",
                spread(rates, 1),
                spread([plain.rate for _, plain in rounds], 1),
                spread(ratios),
                _judge(median(ratios) >= 0.7),
                f"{median(rates) / first:.2f}",
                spread([ours.passes for ours, _ in rounds], 1),
                f"{cpu(ours for ours, _ in rounds)}; {cpu(plain for _, plain in rounds)}",
                f"{median([each.cores for pair in rounds for each in pair]):.2f}",
                f"{max(each.others for pair in rounds for each in pair):.2f}",
            ]
        )
    head = [
        f"jobs at once, pods {kind}",
        "jobs/s",
        "plain Jobs/s",
        "ratio",
        "target 0.7",
        f"of the rate at {min(found)}",
        "passes a job",
        "operator + API server + rest of the control plane, CPU ms a job; plain",
        "busy cores",
        "of them with other load",
    ]
    return table(head, rows)


def cpu(rounds: Iterable[Burst]) -> str:
    """Milliseconds a job of the operator, the API server, and the rest of the control plane."""
    both = [tuple(1000 * each / burst.jobs for each in burst.cpu) for burst in rounds]
    return " + ".join(f"{median(each):.0f}" for each in zip(*both, strict=True))


def gangs(kind: str, workers: int, found: Sequence[tuple[float, float]]) -> str:
    ratios = [plain / ours for ours, plain in found]
    row = [
        f"{workers}",
        spread([ours for ours, _ in found]),
        spread([plain for _, plain in found]),
        f"{spread(ratios)}: {_judge(median(ratios) >= 1)}",
    ]
    head = [
        f"workers of one job, pods {kind}",
        "from readiness, s",
        "plain Job, s",
        "speed, times the plain Job",
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


def requests(found: dict[str, float]) -> str:
    passes = found.pop("passes")
    rows = [[name, f"{count:.1f}"] for name, count in found.items()]
    rows.append(["**all**", f"{sum(found.values()):.1f}"])
    head = [f"requests for one job of {WORKERS} workers, creation to completion", "times"]
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
