"""What a person reads when a run is complete."""

import ast
import json
import shlex
from pathlib import Path

import pytest

from cptjob import jobs
from cptjob.summary import beginning, summary
from cptjob.volumes import Volumes


def _said(place: Path) -> str:
    return summary(jobs.load(place / "job.yaml", place / "out", Volumes.parse([], place), 1).config)


def _strings_of_the_command(said: str) -> list[str]:
    """The strings of the Python program that a shell makes of the last line."""
    python, option, program = shlex.split(said.splitlines()[-1])
    assert (Path(python).name[:6], option) == ("python", "-c")
    nodes = ast.walk(ast.parse(program))
    return [node.value for node in nodes if isinstance(node, ast.Constant) if node.value != 40]


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("The court finds that the appeal is dismissed.", "The court finds that the appeal"),
        ("Title\n=====\n\nA sentence is longer than its heading.", "A sentence is longer than its"),
        ("Short", "Short"),
        ('It\'s "$HOME" `id` \\ \x1b and so on', 'It\'s "$HOME" `id` \\ \x1b and'),
        ("裁判所" * 50, "裁判所" * 20),
        ("half \ud800 a pair", "half \ud800 a pair"),
    ],
)
def test_the_command_begins_a_sentence_of_the_domain_text(
    place: Path, text: str, prompt: str
) -> None:
    data = place / "volumes" / "data" / "law" / "a.jsonl"
    data.write_text(json.dumps({"text": text}) + "\n")
    assert beginning(text) == prompt
    assert prompt in _strings_of_the_command(_said(place))


@pytest.mark.parametrize("rest", ["", "{", '{"body": 1}\n', "[]\n"])
def test_the_command_has_a_prompt_where_the_text_is_gone(place: Path, rest: str) -> None:
    config = jobs.load(place / "job.yaml", place / "out", Volumes.parse([], place), 1).config
    (place / "volumes" / "data" / "law" / "a.jsonl").write_text(rest)
    assert "The" in _strings_of_the_command(summary(config))


def test_a_place_with_quotes_is_still_one_string(place: Path) -> None:
    home = place / "a \"b\" 'c'"
    home.mkdir()
    config = jobs.load(place / "job.yaml", home, Volumes.parse([], place), 1).config
    assert str(home / "model") in _strings_of_the_command(summary(config))


def test_a_loss_that_is_no_number_is_told_with_its_reason(place: Path) -> None:
    (place / "out").mkdir()
    value = {
        "metrics": {"heldout_domain_loss": None, "heldout_domain_loss_base": 3.0},
        "notFinite": {"heldout_domain_loss": "the loss is not a finite number"},
    }
    (place / "out" / "manifest.json").write_text(json.dumps(value))
    said = _said(place)
    assert "domain text:  the loss is not a finite number\n" in said
    assert "general text: not measured; the job has no General data\n" in said


def test_a_loss_of_which_nothing_is_held_out_says_what_to_do(place: Path) -> None:
    (place / "out").mkdir()
    value = {"metrics": {}, "data": {"sources": [{"name": "law", "role": "Domain"}]}}
    (place / "out" / "manifest.json").write_text(json.dumps(value))
    said = _said(place)
    assert "not measured; nothing of it is held out: set validation.splitPercent above 0" in said
    job = place / "job.yaml"
    job.write_text(job.read_text().replace("splitPercent: 0", "splitPercent: 5"))
    said = _said(place)
    assert "not measured; nothing of it is held out: of one document none can be spared" in said
