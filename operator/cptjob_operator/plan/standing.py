"""The job's standing as conditions: phase, reason and message become the list in the status. Pure.

The table of phases (`cptjob_api.conditions.PHASES`) says which conditions are true and false in a
phase; this keeps their transition times, and what latches.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Literal

from cptjob_api.conditions import PHASES, Condition, Phase, Reason
from cptjob_api.status import ConditionStatus

_ROWS = {row.phase: row for row in PHASES}
#: Present only while they hold, as kstatus asks of them.
_ABSENT_UNLESS_TRUE = (Condition.RECONCILING, Condition.STALLED)
_MESSAGE_CHARACTERS = 32_000
#: What was reached once is told in its own words, whatever the phase says by now.
_OWN = {Condition.PREPARED: (Reason.PREPARED, Reason.PREPARED.sentence)}


def conditions(
    before: Iterable[ConditionStatus],
    phase: Phase,
    reason: Reason,
    message: str,
    generation: int,
    now: datetime,
    extra: Iterable[tuple[Condition, bool, Reason, str]] = (),
) -> tuple[ConditionStatus, ...]:
    """The conditions of a job in `phase`, in the order of their definition.

    `extra` holds those that the phase does not decide, such as CheckpointReady, and those that are
    otherwise than in other jobs of the phase.
    """
    kept = {each.type: each for each in before}
    row = _ROWS[phase]
    decided = [(kind, True, *_OWN.get(kind, (reason, message))) for kind in row.true]
    decided += [(kind, False, reason, message) for kind in row.false]
    held: set[Condition] = set()
    for kind, holds, why, text in (*decided, *extra):
        (held.add if holds else held.discard)(kind)
        kept[kind] = _condition(kept.get(kind), kind, holds, why, text, generation, now)
    for kind in _ABSENT_UNLESS_TRUE:
        if kind not in held:
            kept.pop(kind, None)
    if Condition.SUSPENDED in kept and phase is not Phase.SUSPENDED:
        old = kept[Condition.SUSPENDED]
        if old.status == "True":
            kept[Condition.SUSPENDED] = _condition(
                old, Condition.SUSPENDED, False, Reason.RESUMED, "", generation, now
            )
    return tuple(kept[kind] for kind in Condition if kind in kept)


def _condition(
    old: ConditionStatus | None,
    kind: Condition,
    holds: bool,
    reason: Reason,
    message: str,
    generation: int,
    now: datetime,
) -> ConditionStatus:
    status: Literal["True", "False"] = "True" if holds else "False"
    changed = old is None or old.status != status
    return ConditionStatus(
        type=kind,
        status=status,
        observed_generation=generation,
        last_transition_time=now if old is None or changed else old.last_transition_time,
        reason=reason,
        message=message[:_MESSAGE_CHARACTERS],
    )
