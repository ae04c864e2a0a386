"""Numbers with their nouns, as a person says them."""


def counted(number: int, one: str, many: str = "") -> str:
    """`1 row`, `2 rows`; `many` is given where it is not `one` with an s, as in `steps were`."""
    return f"{number} {one if number == 1 else many or one + 's'}"
