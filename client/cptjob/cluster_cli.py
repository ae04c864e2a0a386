"""The commands that speak to a cluster: `cptjob submit`, `status`, `logs`, `suspend`, `resume`, `cancel`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cptjob_api.conditions import Condition
from cptjob_trainer.errors import CPTJobError

if TYPE_CHECKING:
    from cptjob.client import Client
    from cptjob_api.job import CPTJob

Command = Callable[..., Any]


def place_options(command: Command) -> Command:
    """Which cluster and namespace, as kubectl takes them."""
    for option in (
        click.option(
            "--kubeconfig", metavar="FILE", help="By default $KUBECONFIG, ~/.kube/config."
        ),
        click.option("--context", metavar="NAME", help="By default the current one."),
        click.option("-n", "--namespace", metavar="NAME", help="By default the context's."),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-w", "--watch", is_flag=True, help="Follow the job until it has ended, or cannot go on."
)
@place_options
def submit(file: Path, watch: bool, **place: str | None) -> int:
    """Check the manifest in FILE and give the job to the cluster."""
    from cptjob import jobs

    manifest, job = jobs.read(file)
    for note in manifest.notes:
        click.echo(f"note: {note}", err=True)
    place["namespace"] = jobs.namespace(job, place["namespace"])
    with _client(place) as cluster:
        made = cluster.create(job)
        name = made.metadata.name
        click.echo(f"job {name} is made in namespace {cluster.namespace}")
        return _follow(cluster, name) if watch else 0


@click.command()
@click.argument("name", required=False)
@click.option(
    "-w", "--watch", is_flag=True, help="Follow the job until it has ended, or cannot go on."
)
@place_options
def status(name: str | None, watch: bool, **place: str | None) -> int:
    """Say how the job NAME stands, or list all jobs."""
    from cptjob import standing

    if name is None and watch:
        raise click.UsageError("--watch needs the NAME of a job")
    with _client(place) as cluster:
        if name is None:
            found = cluster.list()
            none = f"there are no jobs in namespace {cluster.namespace}"
            click.echo(standing.table(found) if found else none)
            return 0
        if watch:
            return _follow(cluster, name)
        click.echo(standing.page(cluster.get(name)))
        return 0


@click.command()
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@click.option(
    "--tail", type=click.IntRange(min=0), metavar="N", help="Of each pod the last N lines."
)
@place_options
def logs(name: str, follow: bool, tail: int | None, **place: str | None) -> int:
    """Print what the pods of the job NAME say, each line with its pod.

    w1 is worker 1 and c0 the coordinator; w1.2.0 is worker 1 of attempt 2, and its replacement 0
    there.
    """
    with _client(place) as cluster:
        for line in cluster.logs(name, follow=follow, tail=tail):
            click.echo(f"{click.style(line.source, fg=_colour(line.source))} {line.text}")
    return 0


@click.command()
@click.argument("name")
@click.option("--wait", is_flag=True, help="Until it has saved and holds no pods.")
@place_options
def suspend(name: str, wait: bool, **place: str | None) -> int:
    """Let the job NAME save a checkpoint and give its nodes back."""
    from cptjob.cluster import RESTS

    with _client(place) as cluster:
        cluster.suspend(name)
        if wait:
            cluster.wait(name, (Condition.SUSPENDED, *RESTS))
        click.echo(
            f"job {name} {'is' if wait else 'will be'} suspended; cptjob resume {name} goes on"
        )
    return 0


@click.command()
@click.argument("name")
@place_options
def resume(name: str, **place: str | None) -> int:
    """Let the suspended job NAME go on from its last checkpoint."""
    with _client(place) as cluster:
        cluster.resume(name)
        click.echo(f"job {name} goes on")
    return 0


@click.command()
@click.argument("name")
@place_options
def cancel(name: str, **place: str | None) -> int:
    """Delete the job NAME; what it has written so far stays."""
    with _client(place) as cluster:
        job = cluster.get(name)
        cluster.delete(name)
        click.echo(f"job {name} is deleted; its pods save and end{_left(job)}")
    return 0


COMMANDS = (submit, status, logs, suspend, resume, cancel)


def _colour(source: str) -> str:
    """One for each pod of a few; click leaves colours out where there is no terminal."""
    colours = ("cyan", "yellow", "green", "magenta", "blue")
    return colours[sum(source.encode()) % len(colours)]


def _client(place: dict[str, str | None]) -> "Client":
    from cptjob.client import Client

    return Client(**place)


def _follow(cluster: "Client", name: str) -> int:
    """Shows progress until the job has ended; the exit code says how."""
    from rich.console import Console

    from cptjob import standing
    from cptjob.live import LiveDisplay

    with LiveDisplay(Console(stderr=True)) as display:
        job = cluster.wait(name, see=lambda each: display.update(standing.progress(each)))
    click.echo(standing.page(job))
    return 0 if _is_complete(job) else CPTJobError.exit_code


def _is_complete(job: "CPTJob") -> bool:
    from cptjob.standing import is_true

    return is_true(job, Condition.COMPLETE)


def _left(job: "CPTJob") -> str:
    saved = job.status.last_checkpoint if job.status else None
    return f"; checkpoint of step {saved.step} is at {saved.uri}" if saved else ""
