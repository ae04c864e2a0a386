"""Kubernetes quantities such as 500m and 8Gi, as exact numbers."""

import re
from decimal import Decimal

from cptjob_api.spec import QUANTITY_PATTERN

_LIMIT = Decimal(2) ** 63
_SUFFIX = re.compile(r"(?:[eE][+-]?[0-9]+|[numkMGTPE]|[KMGTPE]i)?$")
_FACTORS: dict[str, Decimal] = {
    **{letter: Decimal(10) ** power for letter, power in zip("num", (-9, -6, -3), strict=True)},
    **{letter: Decimal(10) ** (3 * n) for n, letter in enumerate("kMGTPE", 1)},
    **{f"{letter}i": Decimal(1024) ** n for n, letter in enumerate("KMGTPE", 1)},
    "": Decimal(1),
}


def parse(text: str) -> Decimal | None:
    """The number that a quantity stands for.

    None for what is no quantity, and beyond 2^63, where there is nothing left to count.
    """
    if not re.fullmatch(QUANTITY_PATTERN, text):
        return None
    suffix = _SUFFIX.search(text)
    ending = suffix[0] if suffix else ""
    try:
        if ending[:1] in ("e", "E") and len(ending) > 1:
            number = Decimal(text)
        else:
            number = Decimal(text.removesuffix(ending)) * _FACTORS[ending]
        return number if abs(number) < _LIMIT else None
    except ArithmeticError:
        return None


def whole(text: str) -> int | None:
    """A quantity that counts things, such as GPUs; None for a part of one, and below 0."""
    number = parse(text)
    if number is None or number < 0 or number != number.to_integral_value():
        return None
    return int(number)
