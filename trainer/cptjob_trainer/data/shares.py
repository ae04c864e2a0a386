"""How many rows of each source are drawn. Exact arithmetic, so that an estimate and the training
agree; needs the standard library only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from cptjob_trainer.errors import ConfigError

# The share of general text when no weight is given.
GENERAL_SHARE = Fraction(1, 20)


@dataclass(frozen=True)
class Share:
    """What decides how many rows of one source are drawn."""

    name: str
    general: bool
    rows: int
    weight: float | None


def quotas(shares: Sequence[Share], epochs: int) -> tuple[int, ...]:
    """Rows to draw from each source, in the order given.

    Domain rows are epochs x the rows there are; explicit domain weights, all or none, split that
    sum. General rows are added so that they make up their share of all rows: 5 % split by size, or
    explicit weights, all or none, that sum to less than 1. Raises ConfigError.
    """
    domain = [share for share in shares if not share.general]
    general = [share for share in shares if share.general]
    if not domain:
        raise ConfigError("datasets: at least one with role Domain is needed")
    _check_weights(domain, "Domain")
    _check_weights(general, "General")
    domain_rows = epochs * sum(share.rows for share in domain)
    if domain[0].weight is None:
        drawn = {share.name: epochs * share.rows for share in domain}
    else:
        drawn = _split(domain_rows, {share.name: _exact(share.weight) for share in domain})
    if general:
        parts = _general_parts(general)
        whole = sum(parts.values(), Fraction(0))
        general_rows = max(1, _round(domain_rows * whole / (1 - whole)))
        drawn |= _split(general_rows, parts)
    return tuple(drawn[share.name] for share in shares)


def asked(shares: Sequence[Share]) -> tuple[float, ...]:
    """The share of all rows that was asked for each source: `quotas` before they are rounded."""
    general = [share for share in shares if share.general]
    domain = [share for share in shares if not share.general]
    parts = _general_parts(general) if general else {}
    rest = 1 - sum(parts.values(), Fraction(0))
    sizes = {
        share.name: Fraction(share.rows) if share.weight is None else _exact(share.weight)
        for share in domain
    }
    whole = sum(sizes.values(), Fraction(0))
    parts |= {name: rest * size / whole for name, size in sizes.items()}
    return tuple(float(parts[share.name]) for share in shares)


def _general_parts(general: Sequence[Share]) -> dict[str, Fraction]:
    """The share of all rows of each general source."""
    if general[0].weight is None:
        rows = sum(share.rows for share in general)
        return {share.name: GENERAL_SHARE * share.rows / rows for share in general}
    parts = {share.name: _exact(share.weight) for share in general}
    whole = sum(parts.values(), Fraction(0))
    if whole >= 1:
        raise ConfigError(
            f"datasets: the weights of General data are shares of all tokens and sum to "
            f"{float(whole):g}; they must sum to less than 1, for example 0.05"
        )
    return parts


def _check_weights(shares: Sequence[Share], role: str) -> None:
    given = [share for share in shares if share.weight is not None]
    for share in given:
        if _exact(share.weight) <= 0:
            raise ConfigError(
                f"datasets[{share.name}].weight: {share.weight:g} would never be drawn; give a "
                "number above 0, or remove the data set"
            )
    if given and len(given) < len(shares):
        missing = next(share.name for share in shares if share.weight is None)
        raise ConfigError(
            f"datasets[{missing}].weight: missing, while {given[0].name} has one; give weights to "
            f"all data sets of role {role} or to none"
        )


def _split(whole: int, parts: dict[str, Fraction]) -> dict[str, int]:
    """Split `whole` by `parts`, by largest remainder; ties go to the one named first."""
    total = sum(parts.values(), Fraction(0))
    exact = {name: whole * part / total for name, part in parts.items()}
    result = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: result[name] - exact[name])
    for name in by_remainder[: whole - sum(result.values())]:
        result[name] += 1
    return result


def _exact(weight: float | None) -> Fraction:
    """The number as a person wrote it: 0.1 is a tenth."""
    return Fraction(repr(weight or 0.0))


def _round(value: Fraction) -> int:
    return int(value + Fraction(1, 2))


def drawn(total_rows: int, batch: int, steps: int) -> int:
    """Rows that `steps` train on: all, but for those that maxSteps cuts off."""
    return min(total_rows, steps * batch)


def steps(total_rows: int, batch: int, max_steps: int | None) -> int:
    """Steps that see `total_rows` in batches, the last of which may be short."""
    whole = -(-total_rows // batch)
    return min(whole, max_steps or whole)
