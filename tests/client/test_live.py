"""What a person reads while a job runs."""

import io
from typing import Any

import pytest
from rich.console import Console

from cptjob.live import LiveDisplay
from cptjob_trainer.training.narrator import describe, duration, si

TRAINING: dict[str, Any] = {
    "phase": "Training",
    "currentStep": 12,
    "totalSteps": 40,
    "progressPercentage": 30.0,
    "estimatedRemainingSeconds": 3725,
    "tokensPerSecond": 5120.0,
    "metrics": {"loss": 3.21987},
    "lastCheckpoint": {"step": 10},
}


def test_one_line_has_everything_that_is_known() -> None:
    assert describe(TRAINING) == (
        "step 12 of 40, loss 3.2199, 5.1k tokens/s, ETA 1:02:05, checkpoint at step 10"
    )
    assert describe(
        {"phase": "Preparing", "message": "Tokenising", "progressPercentage": 41.7}
    ) == ("Tokenising, 42 %")
    assert describe({}) == ""


def test_without_a_terminal_it_writes_plain_lines_at_each_phase() -> None:
    text = io.StringIO()
    with LiveDisplay(Console(file=text, force_terminal=False)) as display:
        display.update({"phase": "Loading"})
        display.update(TRAINING)
        display.update({**TRAINING, "currentStep": 13})
        display.update({**TRAINING, "phase": "Saving"})
    lines = text.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["Loading", "Training", "Saving"]
    assert "\x1b" not in text.getvalue()


def test_on_a_terminal_it_draws_a_bar() -> None:
    text = io.StringIO()
    with LiveDisplay(Console(file=text, force_terminal=True, width=120)) as display:
        display.update(TRAINING)
        display.say("a note")
    assert "step 12 of 40" in text.getvalue()
    assert "a note" in text.getvalue()


@pytest.mark.parametrize("width", [30, 40, 60, 80, 200])
def test_nothing_is_cut_off_in_a_narrow_terminal(width: int) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=width, height=50, color_system=None)
    with LiveDisplay(console) as display:
        display.update(TRAINING)
    last = text.getvalue().rpartition("Training")[2]
    words = [word for word in last.split() if word.strip("━╸╺") and "\x1b" not in word]
    assert " ".join(words) == describe(TRAINING)


def test_numbers_are_short() -> None:
    assert [si(0), si(999), si(1234), si(989e12)] == ["0", "999", "1.2k", "989.0T"]
    assert [duration(0.4), duration(61), duration(90_061)] == ["0:00:00", "0:01:01", "1 d 1:01:01"]
