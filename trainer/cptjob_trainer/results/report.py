"""`report.html`: one page that needs nothing else, with the plots a person looks for after a run.

python -m cptjob_trainer.results.report OUT      write it again, also while the run goes on
"""

import argparse
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from cptjob_trainer.data import advice
from cptjob_trainer.disk import is_full
from cptjob_trainer.errors import MissingInputError, OutputError, StorageFullError
from cptjob_trainer.results.plots import data_wait_share, plots, scientific, short
from cptjob_trainer.results.record import ROLES, Column, Record, read_record
from cptjob_trainer.termination import guard

#: Rows of a table of numbers at most.
_MOST_ROWS = 50
#: A smaller difference of losses is said to be none.
_NO_DIFFERENCE = 0.0005
_UNKNOWN = "–"
#: Between no-break spaces: a line must not begin with it.
_ARROW = "\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Tile:
    """One number of the headline."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """`cells` are text, a list for each row; `left` columns are names and not numbers."""

    heads: list[str]
    cells: list[list[str]]
    left: int = 1


def write_report(out: Path, manifest: Mapping[str, Any] | None = None) -> Path:
    """Write `OUT/report.html`, whole or not at all, and return its path.

    manifest: that of a run which has just completed; left out, what is found in `out` is told,
    also of a run that still goes on or was stopped. Raises MissingInputError when there is
    nothing to tell, OutputError when the page cannot be written.
    """
    found = [out / "metrics.jsonl", out / "manifest.json"]
    if manifest is None and not any(path.is_file() for path in found):
        raise MissingInputError(
            f"{out}: neither metrics.jsonl nor manifest.json is there; give the output folder of a "
            "run that has begun to train"
        )
    try:
        record = read_record(out, manifest)
    except OSError as error:
        raise MissingInputError(
            f"{error.filename or out} cannot be read: {error.strerror}; check its permissions"
        ) from error
    return _write(out / "report.html", page(record))


def page(record: Record) -> str:
    """The page as HTML; equal records give equal text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        record=record,
        tiles=_tiles(record),
        plots=plots(record),
        settings=_flat(record.settings),
        software=_flat(record.software),
        sources=_sources(record),
        heldout=_held_out(record),
        numbers=_numbers(record),
    )


def _write(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            # A name from outside may hold half a surrogate pair, which has no bytes.
            temporary.write_bytes(text.encode("utf-8", "replace"))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if is_full(error):
            raise StorageFullError(
                f"{path}: no space left for the report; make room and run `cptjob report` again"
            ) from error
        raise OutputError(
            f"{path}: the report cannot be written: {error.strerror}; check the folder's permissions"
        ) from error
    return path


# --- headline -------------------------------------------------------------------------------------


def _tiles(record: Record) -> list[Tile]:
    speed = record.tokens / record.training_seconds if record.training_seconds > 0 else math.nan
    total = record.total_steps
    tiles = [_held_out_tile(record, role) for role in ROLES]
    tiles.append(
        Tile(
            "Steps",
            f"{record.step:,} of {total:,}" if total else f"{record.step:,}",
            f"{100 * record.step / total:.3g} %" if total else "total not known",
        )
    )
    prompt = ", without the system prompts" if record.settings.get("systemPrompt") else ""
    tiles.append(Tile("Tokens trained", short(record.tokens), f"{record.tokens:,}{prompt}"))
    tiles.append(Tile("Training time", duration(record.training_seconds), _evaluating(record)))
    tiles.append(Tile("Tokens per second", _number(speed, short), _utilisation(record)))
    return tiles


def _held_out_tile(record: Record, role: str) -> Tile:
    label, losses = f"Held-out loss, {role.lower()} text", record.losses(role)
    if not losses:
        return Tile(label, "not measured", _why_not_measured(record, role))
    if role not in record.base:
        return Tile(label, f"{losses[-1][1]:.3f}", "the base model's is not known")
    before, after = losses[0][1], losses[-1][1]
    if len(losses) == 1:
        return Tile(label, f"{before:.3f}", f"base model, perplexity {_perplexity(before)}")
    return Tile(
        label,
        f"{before:.3f}{_ARROW}{after:.3f}",
        f"{_signed(after - before)} ({_verdict(after - before, role)}); "
        f"perplexity {_perplexity(before)}{_ARROW}{_perplexity(after)}",
    )


def _why_not_measured(record: Record, role: str) -> str:
    trained = {source.role for source in record.sources}
    if record.state != "Complete" and role in trained:
        return "not evaluated yet, or nothing of it is held out"
    return advice.why_not_measured(role, trained, record.split_percent)


def _verdict(difference: float, role: str) -> str:
    if abs(difference) < _NO_DIFFERENCE:
        return "the same"
    if difference < 0:
        return "better"
    return "worse: forgotten" if role == "General" else "worse"


def _perplexity(loss: float) -> str:
    return short(math.exp(loss)) if loss < 100 else "over 1e43"


def _evaluating(record: Record) -> str:
    seconds = record.evaluation_seconds
    return "" if seconds is None else f"and {duration(seconds)} of evaluation"


def _utilisation(record: Record) -> str:
    mean = _mean(record.steps.mfu)
    return "" if math.isnan(mean) else f"{100 * mean:.1f} % of the device's peak (MFU)"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 8.2 s, 3 min 5 s, 2 h 10 min, 3 d 4 h."""
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds < 59.95 else "1 min 0 s"
    whole = round(seconds)
    for size, unit, smaller_size, smaller in (
        (86_400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller_size} {smaller}"
    return f"{whole} s"


# --- tables ---------------------------------------------------------------------------------------


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, text) of each value of nested objects, by name: a file keeps no order."""
    rows = []
    for name, value in sorted(values.items()):
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            rows.append((f"{prefix}{name}", ", ".join(_text(item) for item in value)))
        else:
            rows.append((f"{prefix}{name}", _text(value)))
    return rows


def _text(value: object) -> str:
    if value is None:
        return _UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    return scientific(value) if isinstance(value, float) else str(value)


def _sources(record: Record) -> Table:
    trained = sum(source.trained_tokens for source in record.sources)
    cells = [
        [
            source.name,
            source.role or _UNKNOWN,
            _integer(source.documents),
            _integer(source.tokens),
            f"{source.trained_tokens:,}",
            _times(source.trained_tokens / source.tokens) if source.tokens else _UNKNOWN,
            f"{100 * source.trained_tokens / trained:.2f} %" if trained else _UNKNOWN,
            _UNKNOWN if source.asked_share is None else f"{100 * source.asked_share:.2f} %",
        ]
        for source in record.sources
    ]
    heads = ["Source", "Role", "Documents", "Tokens", "Trained on", "Times seen"]
    return Table([*heads, "Share", "Asked for"], cells, left=2)


def _times(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _held_out(record: Record) -> Table:
    """One row an evaluation: losses by role and by source."""
    names = sorted({name for e in record.evaluations for name in e.values})
    sources = [name.removeprefix("heldout/") for name in names if name.startswith("heldout/")]
    heads = ["Step"]
    for role in ROLES:
        heads += [role, f"{role}, difference"]
    rows = [["0", *_by_role(record, {}, record.base), *_losses(record.base_by_source, sources)]]
    kept = record.evaluations[:: -(-len(record.evaluations) // _MOST_ROWS) or 1]
    if record.evaluations and kept[-1] is not record.evaluations[-1]:
        kept = (*kept, record.evaluations[-1])
    for evaluation in kept:
        values = evaluation.values
        losses = {
            role: values[key] for role in ROLES if (key := f"heldout_{role.lower()}_loss") in values
        }
        by_source = {
            name: values[f"heldout/{name}"] for name in sources if f"heldout/{name}" in values
        }
        rows.append(
            [
                f"{evaluation.step:,}",
                *_by_role(record, record.base, losses),
                *_losses(by_source, sources),
            ]
        )
    if not record.base and not record.evaluations:
        rows = []
    return Table([*heads, *sources], rows)


def _by_role(record: Record, base: Mapping[str, float], losses: Mapping[str, float]) -> list[str]:
    cells = []
    for role in ROLES:
        known = role in losses
        cells.append(f"{losses[role]:.4f}" if known else _UNKNOWN)
        cells.append(_signed(losses[role] - base[role]) if known and role in base else _UNKNOWN)
    return cells


def _losses(losses: Mapping[str, float], sources: Sequence[str]) -> list[str]:
    return [f"{losses[name]:.4f}" if name in losses else _UNKNOWN for name in sources]


def _numbers(record: Record) -> Table:
    """The plotted numbers: each step of a short run, means over stretches of a long one."""
    steps = record.steps
    edges = np.unique(np.linspace(0, len(steps), min(len(steps), _MOST_ROWS) + 1).astype(int))
    waiting = data_wait_share(steps)
    cells = []
    for start, end in itertools.pairwise(edges):

        def mean(column: Column, part: slice = slice(start, end)) -> float:
            return _mean(column[part])

        first, last = steps.step[start], steps.step[end - 1]
        cells.append(
            [
                f"{last:,.0f}" if end - start == 1 else f"{first:,.0f} to {last:,.0f}",
                _number(mean(steps.loss), "{:.4f}".format),
                _number(mean(steps.learning_rate), scientific),
                _number(mean(steps.grad_norm), "{:.4g}".format),
                _number(mean(steps.tokens_per_second), short),
                _number(100 * mean(waiting), "{:.2f} %".format),
                _number(100 * mean(steps.padding), "{:.2f} %".format),
                f"{int(steps.skipped[start:end].sum())}",
            ]
        )
    heads = ["Step", "Loss", "Learning rate", "Gradient norm", "Tokens/s", "Waiting", "Padding"]
    return Table([*heads, "Skipped"], cells)


def _mean(values: Column) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _number(value: float, written: Any) -> str:
    return _UNKNOWN if math.isnan(value) else str(written(value))


def _integer(value: int | None) -> str:
    return _UNKNOWN if value is None else f"{value:,}"


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


# --- the command ----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of an output folder and print where it is."""
    parser = argparse.ArgumentParser(prog="cptjob_trainer.results.report", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="output folder of a run")
    options = parser.parse_args(arguments)
    with guard():
        print(write_report(options.out))


if __name__ == "__main__":
    main()
