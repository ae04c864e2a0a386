"""What a person reads when a run is complete."""

import contextlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from cptjob_trainer.config import TrainerConfig
from cptjob_trainer.data import advice, request
from cptjob_trainer.errors import CPTJobError

# A prompt is so many words, or characters where there are no spaces between words.
_WORDS = 6
_CHARACTERS = 60
# A line of data has at most so many bytes.
_LONGEST_LINE = 32 << 20


def summary(config: TrainerConfig) -> str:
    """Where everything is, what the training did to held-out losses, and how to use the model."""
    out = config.paths.output
    manifest: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        manifest = dict(json.loads((out / "manifest.json").read_bytes()))
    shown = _shown(out)
    percent = config.validation.split_percent
    lines = [_losses(manifest, role, percent) for role in ("domain", "general")]
    lines += ["", f"Model:        {shown / 'model'}"]
    if (out / "adapter").is_dir():
        lines.append(f"Adapter:      {shown / 'adapter'}")
    lines += [
        f"Report:       {shown / 'report.html'}",
        f"Checkpoints:  {shown / 'checkpoints'}",
        "",
        "Use it:",
        f"  {shlex.quote(_python())} -c {shlex.quote(_usage_example(shown / 'model', prompt(config)))}",
    ]
    return "\n".join(lines)


def _losses(manifest: dict[str, Any], role: str, percent: float) -> str:
    metrics, unknown = manifest.get("metrics", {}), manifest.get("notFinite", {})
    after = metrics.get(f"heldout_{role}_loss")
    before = metrics.get(f"heldout_{role}_loss_base")
    reason = unknown.get(f"heldout_{role}_loss") or unknown.get(f"heldout_{role}_loss_base")
    name = f"Held-out loss, {role} text:"
    if not isinstance(after, int | float) or not isinstance(before, int | float):
        return f"{name:<29}{reason or _not_measured(manifest, role.capitalize(), percent)}"
    return f"{name:<29}{before:.4f} before, {after:.4f} after ({after - before:+.4f})"


def _not_measured(manifest: dict[str, Any], role: str, percent: float) -> str:
    sources = manifest.get("data", {}).get("sources", [])
    why = advice.why_not_measured(role, {source.get("role") for source in sources}, percent)
    return f"not measured; {why}"


def _shown(path: Path) -> Path:
    """Relative to the current directory where that is shorter to read."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _python() -> str:
    return str(_shown(Path(sys.executable)))


def _usage_example(model: Path, text: str) -> str:
    return (
        "from transformers import pipeline; "
        f'print(pipeline("text-generation", {_literal(str(model))})'
        f'({_literal(text)}, max_new_tokens=40)[0]["generated_text"])'
    )


def _literal(text: str) -> str:
    """A string of Python, in double quotes where it can be: the shell's are single."""
    return json.dumps(text) if text.isascii() and text.isprintable() else repr(text)


def prompt(config: TrainerConfig) -> str:
    """How a sentence of the domain text begins; "The" where nothing of it can be read any more."""
    for dataset in (*config.validation.datasets, *config.datasets):
        if dataset.role != "Domain":
            continue
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, CPTJobError):
            if begun := beginning(_first_document(request.files(dataset.path)[0])):
                return begun
    return "The"


def _first_document(file: Path) -> str:
    with file.open(encoding="utf-8") as lines:
        return str(json.loads(lines.readline(_LONGEST_LINE))["text"])


def beginning(text: str) -> str:
    """The first words of the first sentence; headings and their underlines are passed over."""
    paragraphs = [paragraph.split() for paragraph in text.split("\n\n")]
    sentences = [words for words in paragraphs if len(words) > _WORDS]
    words = (sentences or [text.split()])[0]
    return " ".join(words[:_WORDS])[:_CHARACTERS]
