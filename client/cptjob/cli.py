"""The command line: `cptjob run`, `validate`, `prepare`, `estimate`, `report`, `export`; those for a
cluster are in cluster_cli.py.

An error is one clear line on stderr; exit codes are those of cptjob_trainer.errors. What is slow to
import is imported by the command that needs it.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cptjob.cluster_cli import COMMANDS
from cptjob_trainer.errors import CPTJobError, MissingInputError, UsageError
from cptjob_trainer.lifeline import PARENT_VARIABLE

if TYPE_CHECKING:
    from cptjob.jobs import LocalJob
    from cptjob_trainer.config import TrainerConfig

Command = Callable[..., Any]

_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `cptjob`; ends the process."""
    try:
        code = cli.main(args=arguments, prog_name="cptjob", standalone_mode=False)
    except CPTJobError as error:
        _debug()
        _print_error(str(error))
        code = error.exit_code
    except click.ClickException as error:
        _print_error(_usage(error))
        code = UsageError.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
    except Exception as error:
        _debug()
        _print_error(
            f"{type(error).__name__}: {error} (unforeseen; CPTJOB_DEBUG=1 shows the traceback)"
        )
        code = CPTJobError.exit_code
    sys.exit(code if isinstance(code, int) else 0)


def _debug() -> None:
    if os.environ.get("CPTJOB_DEBUG") == "1":
        traceback.print_exc()


def _print_error(message: str) -> None:
    for line in message.splitlines() or [""]:
        click.echo(f"error: {line}", err=True)


def _usage(error: click.ClickException) -> str:
    message = error.format_message().replace("\n", " ").rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{message}; see {context.command_path} --help" if context else message


def _path(_context: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    """A path as it is given. Refuses "", which pathlib takes for the current directory and a shell
    makes of a variable that is not set.
    """
    if value == "":
        option = parameter.opts[0].startswith("-")
        name = parameter.opts[0] if option else parameter.human_readable_name
        raise UsageError(f"{name} is empty: give a path, such as . for the current directory")
    return None if value is None else Path(value)


def job_options(command: Command) -> Command:
    """FILE and the options that say where things lie here."""
    for option in (
        click.option(
            "--processes",
            type=click.IntRange(1, 1024),
            metavar="N",
            help="Processes that train; by default as many as the manifest has in all.",
        ),
        click.option(
            "--volume",
            "volumes",
            multiple=True,
            metavar="CLAIM=DIR",
            help="Directory that stands for a claim; by default ./volumes/CLAIM. Repeatable.",
        ),
        click.option(
            "--output",
            callback=_path,
            metavar="DIR",
            help="Replaces the whole <output.storageUri>/<job name>/.",
        ),
        click.argument("file", callback=_path),
    ):
        command = option(command)
    return command


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cptjob")
@click.pass_context
def cli(context: click.Context) -> int | None:
    """Continued pre-training as one manifest."""
    if context.invoked_subcommand is not None:
        return None
    click.echo(context.get_help())
    return UsageError.exit_code


@cli.command()
@job_options
def run(file: Path, output: Path | None, volumes: tuple[str, ...], processes: int | None) -> int:
    """Train the job in FILE on this machine.

    Ctrl-C saves a checkpoint and stops; the same command goes on from there.
    """
    from cptjob import local
    from cptjob.live import LiveDisplay, console
    from cptjob.summary import summary

    job = _load(file, output, volumes, processes)
    if job.lacks_gpus:
        click.echo(
            "note: the GPUs of spec.trainer are a cluster's; this machine has none, so that this "
            "run trains on its CPUs",
            err=True,
        )
    ending = local.run(job.config, LiveDisplay(console()), job.environment)
    out = job.config.paths.output
    if ending.exit_code == 0:
        if ending.complete:
            click.echo(f"{out} is complete already; nothing is left to do.")
        click.echo(summary(job.config))
    elif ending.exit_code in (local.STOPPED, local.KILLED):
        click.echo(ending.message[:1].upper() + ending.message[1:], err=True)
        click.echo(f"To continue: {_again()}", err=True)
    else:
        _print_error(ending.message)
        click.echo(f"Logs: {ending.logs}", err=True)
    return ending.exit_code


def _load(
    file: Path, output: Path | None, volumes: tuple[str, ...], processes: int | None
) -> "LocalJob":
    from cptjob import jobs
    from cptjob.volumes import Volumes

    job = jobs.load(file, output, Volumes.parse(volumes), processes)
    for note in job.notes:
        click.echo(f"note: {note}", err=True)
    return job


def _again() -> str:
    return shlex.join([sys.argv[0] if sys.argv[0].endswith("cptjob") else "cptjob", *sys.argv[1:]])


@cli.command()
@job_options
@click.option("--data", is_flag=True, help="Look at the model directory and all data, too.")
def validate(
    file: Path, output: Path | None, volumes: tuple[str, ...], processes: int | None, data: bool
) -> int:
    """Check the manifest in FILE; with --data also the model and every line of the data."""
    from cptjob import jobs
    from cptjob.volumes import Volumes

    if not data:
        places = Volumes.parse(volumes)
        manifest, job = jobs.read(file)
        jobs.check_claims(job, places)
        for note in manifest.notes:
            click.echo(f"note: {note}", err=True)
        click.echo(f"{file}: {job.metadata.name} is a valid CPTJob")
        return 0
    loaded = _load(file, output or Path("unused"), volumes, processes)
    code = _run_module("data.prepare", loaded, "--check-only")
    if code == 0:
        _warn_by_estimate(loaded.config)
    return code


def _warn_by_estimate(config: "TrainerConfig") -> None:
    """The steps are known after prepare only; where they can be estimated, that will do."""
    from cptjob import estimate as estimates

    with contextlib.suppress(CPTJobError):
        for warning in estimates.warnings(config, estimates.estimate(config)):
            click.echo(f"warning: {warning}", err=True)


@cli.command()
@job_options
def prepare(
    file: Path, output: Path | None, volumes: tuple[str, ...], processes: int | None
) -> int:
    """Check, tokenise and count the data of the job in FILE, without training."""
    return _run_module("data.prepare", _load(file, output, volumes, processes))


@cli.command()
@job_options
@click.option(
    "--tokens-per-second", type=click.FloatRange(min=0, min_open=True), help="Speed in all."
)
@click.option("--device", metavar="NAME", help="Estimate the speed of such GPUs, such as H100.")
@click.option(
    "--mfu",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.35,
    show_default=True,
    help="Part of the device's peak that training reaches.",
)
def estimate(
    file: Path,
    output: Path | None,
    volumes: tuple[str, ...],
    processes: int | None,
    tokens_per_second: float | None,
    device: str | None,
    mfu: float,
) -> None:
    """Say how many steps and tokens the job in FILE has, and the memory and time it needs."""
    from cptjob import estimate as estimates

    job = _load(file, output or Path("unused"), volumes, processes)
    answer = estimates.estimate(
        job.config, tokens_per_second=tokens_per_second, device=device, mfu=mfu
    )
    click.echo(estimates.render(job.config, answer, device, on_gpus=job.on_gpus))
    for warning in estimates.warnings(job.config, answer):
        click.echo(f"warning: {warning}", err=True)


@cli.command()
@click.argument("out", callback=_path)
def report(out: Path) -> int:
    """Write OUT/report.html again, also while the run goes on."""
    if not out.is_dir():
        raise MissingInputError(f"{out}: there is no such output directory")
    return _call("results.report", str(out))


@cli.command()
@job_options
@click.option("--step", type=click.IntRange(min=0), required=True, help="Step of the checkpoint.")
@click.option(
    "--to",
    callback=_path,
    metavar="DIR",
    help="Directory to make; by default OUT/model-step-N.",
)
def export(
    file: Path,
    output: Path | None,
    volumes: tuple[str, ...],
    processes: int | None,
    step: int,
    to: Path | None,
) -> int:
    """Write a checkpoint of the job in FILE as a model directory."""
    job = _load(file, output, volumes, processes)
    target = to or job.config.paths.output / f"model-step-{step}"
    return _run_module("results.export", job, "--step", str(step), "--to", str(target.absolute()))


def _run_module(module: str, job: "LocalJob", *arguments: str) -> int:
    """Runs a module of the trainer on the job's configuration; its exit code."""
    # Not through a file: a command that is killed would leave it behind.
    config = job.config.model_dump_json()
    return _call(module, "--config", "/dev/stdin", *arguments, given=config)


def _call(module: str, *arguments: str, given: str | None = None) -> int:
    command = [sys.executable, "-m", f"cptjob_trainer.{module}", *arguments]
    environment = os.environ | {PARENT_VARIABLE: str(os.getpid())}
    # Ctrl-C reaches the command as well, which ends in its own words; this one waits for it.
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        done = subprocess.run(command, input=given, text=True, env=environment, check=False)
    finally:
        signal.signal(signal.SIGINT, before)
    return done.returncode


for each in COMMANDS:
    cli.add_command(each)
