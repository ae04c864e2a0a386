"""Speed and memory of the operator on a real control plane, against plain Indexed Jobs.

Every figure of a CPTJob stands beside that of a plain `batch/v1` Job with as many pods, taken in turn
with it on the same control plane. The bench plays the kubelet of all pods of these jobs; only the
fleet that memory is measured with runs by itself.
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "cluster")]

import arms  # noqa: E402
import costs  # noqa: E402
import measures  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402
import stage as stages  # noqa: E402

Say = Callable[[str], None]
KINDS = {"still": stages.STILL, "live": stages.LIVE}
# What the figures are of.
FILES = ["bench/operator", "operator/cptjob_operator"]
PARTS = ("latency", "burst", "gang", "replace", "calls", "costs", "fleet")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python bench/operator", description=__doc__)
    add = parser.add_argument
    add("--full", action="store_true", help="every size of the targets; half an hour")
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="some parts; writes no results")
    add("--print", action="store_true", help="write no results")
    add("--jobs", nargs="+", type=int, help="sizes of the bursts")
    add("--pods", nargs="+", choices=KINDS, help="whether pods run once they have a node")
    add("--rounds", type=int, help="rounds of each burst and gang")
    add("--times", type=int, help="jobs one at a time, and pods that are lost")
    add("--gang", type=int, help="workers of the large job")
    add("--fleet", type=int, help="jobs of the fleet")
    add("--idle", type=float, help="seconds that the fleet is watched while idle")
    asked = parser.parse_args()
    large = ((100, 500, 1000), ("live", "still"), 3, 100, 500, 1000, 330.0)
    small = ((50, 150), ("live",), 2, 25, 200, 200, 20.0)
    names = ("jobs", "pods", "rounds", "times", "gang", "fleet", "idle")
    for name, value in zip(names, large if asked.full else small, strict=True):
        if getattr(asked, name) is None:
            setattr(asked, name, value)
    return asked


async def one_by_one(asked: argparse.Namespace, at: measures.Sides, say: Say) -> None:
    """The parts in which the bench moves each pod."""
    if "latency" in asked.only:
        say(report.latency(await measures.latencies(at, asked.times)))
    if "replace" in asked.only:
        say(report.replaced(await measures.replacements(at, asked.times)))
    if "calls" in asked.only:
        say(report.requests(await measures.calls(at, 10)))


async def many(asked: argparse.Namespace, kind: str, at: measures.Sides, say: Say) -> None:
    """Many jobs at once, and one with many workers."""
    if not {"burst", "gang"} & set(asked.only):
        return
    alike = await at.alike()
    if "burst" in asked.only:
        say(report.bursts(kind, await _bursts(asked, at, alike)))
    if "gang" in asked.only:
        say(report.gangs(kind, asked.gang, await _gangs(asked, at, alike)))


async def _bursts(
    asked: argparse.Namespace, at: measures.Sides, alike: arms.Plain
) -> dict[int, list[report.Bursts]]:
    found: dict[int, list[report.Bursts]] = {}
    for number in range(asked.rounds):
        for jobs in asked.jobs:
            turns: list[arms.Arm] = [at.ours, at.plain, alike]
            if number % 2:  # nobody always comes first
                turns.reverse()
            seen = {id(arm): await measures.burst(at, arm, jobs) for arm in turns}
            ours, plain, like = (seen[id(arm)] for arm in (at.ours, at.plain, alike))
            found.setdefault(jobs, []).append((ours, plain, like))
            print(
                f"{jobs} jobs: {ours.rate:.1f}/s, plain {plain.rate:.1f}/s, of the same pods "
                f"{like.rate:.1f}/s; others {ours.others:.2f}, {plain.others:.2f}, "
                f"{like.others:.2f} cores; {ours.passes:.1f} passes, {report.cpu([ours])} ms, "
                f"plain {report.cpu([plain])} ms, {report.cpu([like])} ms, {ours.calls}",
                file=sys.stderr,
            )
    return found


async def _gangs(
    asked: argparse.Namespace, at: measures.Sides, alike: arms.Plain
) -> list[tuple[float, float, float]]:
    return [
        (
            await measures.gang(at, asked.gang),
            await measures.plain_gang(at.plain, asked.gang),
            await measures.plain_gang(alike, asked.gang),
        )
        for _ in range(asked.rounds)
    ]


async def _sides(asked: argparse.Namespace, stage: stages.Stage, say: Say) -> None:
    with stages.running(stage.operator()) as operator:
        async with measures.sides(stage, operator) as at:
            await one_by_one(asked, at, say)
        for kind in asked.pods:
            async with measures.sides(stage, operator, KINDS[kind]) as at:
                await many(asked, kind, at, say)
        if "costs" in asked.only:
            async with measures.sides(stage, operator) as at:
                whole = await costs.parts(at)
    if "costs" in asked.only:
        say(report.costs(await costs.costs(stage, whole)))


async def _fleet(asked: argparse.Namespace, stage: stages.Stage) -> measures.Fleet:
    with stages.running(stage.operator()) as operator:
        return await measures.fleet(stage, operator, asked.fleet, asked.idle)


def main() -> int:
    asked = options()
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        print(text, end="\n\n", flush=True)

    with tempfile.TemporaryDirectory(prefix="bench-operator-") as folder:
        with stages.Load() as load:
            if set(asked.only) - {"fleet"}:
                with stages.stage(Path(folder) / "pairs") as stage:
                    asyncio.run(_sides(asked, stage, say))
            if "fleet" in asked.only:
                with stages.stage(Path(folder) / "fleet") as stage:
                    say(report.fleet(asyncio.run(_fleet(asked, stage))))
        say(f"Other load over all: {load.others:.2f} cores. Flags: {stages.FLAGS}.")
    if not asked.print and set(asked.only) == set(PARTS):
        results.write("operator", "\n\n".join(said), FILES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
