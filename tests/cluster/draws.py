"""What CI tries of all that `make soak` tries: another part each day, and everything in its turn."""

import datetime
import random
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()


def dice_of_today(what: str) -> random.Random:
    """Chance that is the same all day. what: who throws; others get other numbers."""
    return random.Random(f"{_today():%Y-%m-%d} {what}")


def of_today(things: Iterable[T], what: str, turn: int = 0, turns: int = 1) -> T:
    """The thing whose turn it is. With so many turns a day, all come round before one comes again.

    what: who asks; others begin elsewhere.
    """
    known = list(things)
    random.Random(what).shuffle(known)
    return known[(_today().toordinal() * turns + turn) % len(known)]
