"""A worker that does as its job's name says; stands in for the training in tests of the launcher.

The name is "<act>" or "<act>-<number>"; what it did goes to files in the output directory.
"""

import os
import signal
import time
from pathlib import Path

from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.errors import ConfigError, DataError, MissingInputError, Stopped, UsageError
from cptjob_trainer.run import forkserver
from cptjob_trainer.training import progress

# Stands in for heavy imports: the fork server pays it once, a restarted worker never.
IMPORTED_AT = time.monotonic()
IMPORTED_BY = os.getpid()

ERRORS = {kind.exit_code: kind for kind in (UsageError, DataError, MissingInputError, ConfigError)}


class _Run:
    def __init__(self, config: TrainerConfig) -> None:
        self.output = config.paths.output
        self.rank = int(os.environ["RANK"])
        self.start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        self.stop = False

    def note(self, name: str, text: str = "") -> None:
        target = self.output / f"{name}.{self.rank}.{self.start}"
        target.with_suffix(".tmp").write_text(text)
        target.with_suffix(".tmp").rename(target)

    def on_signal(self, *_: object) -> None:
        self.stop = True

    def train(self) -> None:
        """Runs until it is asked to stop."""
        self.note("training", str(os.getpid()))
        while not self.stop:
            time.sleep(0.02)
        self.note("saved")
        raise Stopped("saved step 7; the same command continues")


def main(config_path: str) -> None:
    config = TrainerConfig.load(config_path)
    run = _Run(config)
    run.note(
        "started",
        f"{os.getppid() == IMPORTED_BY} {forkserver.threads()} {os.environ['OMP_NUM_THREADS']}",
    )
    act, _, number = config.name.partition("-")
    globals()[f"act_{act}"](run, int(number or 0))


def act_ok(_run: _Run, _number: int) -> None:
    pass


def act_publish(run: _Run, _number: int) -> None:
    signal.signal(signal.SIGTERM, run.on_signal)
    if run.rank == 0:
        publisher = progress.StorePublisher(os.environ["CPTJOB_STORE"])
        publisher.publish(progress.Progress(phase="Training", current_step=5, total_steps=10))
        publisher.close()
        run.note("published")
    run.train()


def act_fail(run: _Run, code: int) -> None:
    """Rank 1 fails with a foreseen error; the others wait for it for ever, as in a collective."""
    if run.rank == 1:
        raise ERRORS[code](f"foreseen error {code}")
    time.sleep(3600)


def act_crash(run: _Run, times: int) -> None:
    """Rank 0 dies by SIGKILL in its first starts; its peer sees a broken connection."""
    if run.start >= times:
        return
    if run.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    raise RuntimeError("Connection closed by peer")


def act_train(run: _Run, _number: int) -> None:
    signal.signal(signal.SIGTERM, run.on_signal)
    run.train()


def act_slow(run: _Run, seconds: int) -> None:
    """Its save takes some seconds."""
    signal.signal(signal.SIGTERM, run.on_signal)
    run.note("training", str(os.getpid()))
    while not run.stop:
        time.sleep(0.02)
    run.note("saving")
    time.sleep(seconds)
    run.note("saved")
    raise Stopped("saved step 7; the same command continues")


def act_deaf(run: _Run, _number: int) -> None:
    """Never saves, whatever it is told."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run.note("training", str(os.getpid()))
    time.sleep(3600)


def act_told(run: _Run, _number: int) -> None:
    """Ends well when the test says so."""
    run.note("training", str(os.getpid()))
    while not (run.output / f"end.{run.rank}").exists():
        time.sleep(0.02)


def act_meet(run: _Run, _number: int) -> None:
    """All ranks add up their numbers over gloo, after one restart in the same rendezvous."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([run.rank + 1])
    dist.all_reduce(total)
    if run.start == 0:
        raise RuntimeError("fail once")
    run.note("sum", str(int(total)))


def prepare_text(config: TrainerConfig, report: object, *, stop: object) -> object:
    """Stands in for preparing; see `cptjob_trainer.data.prepare.prepare`."""
    report("counting", 1, 2)  # type: ignore[operator]
    if config.name.startswith("bad"):
        raise DataError("two files are broken")
    while config.name.startswith("endless"):
        if stop():  # type: ignore[operator]
            raise Stopped("stopped while data was prepared")
        time.sleep(0.05)

    class Prepared:
        directory = Path(config.paths.prepared) / "abc"
        model_fingerprint = "model"
        data_fingerprint = "data"
        total_steps = 250

        @property
        def warnings(self) -> tuple[str, ...]:
            """Read once, after preparing and before the store is hosted."""
            if config.name.startswith("late-"):
                os.kill(os.getpid(), signal.Signals[config.name.removeprefix("late-")])
            return ("little data",)

    return Prepared()
