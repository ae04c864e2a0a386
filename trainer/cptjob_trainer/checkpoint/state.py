"""Everything of a run that survives a restart, besides the tensors."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LoopState:
    """Saved with every checkpoint, as JSON. Counts are of the surviving lineage only."""

    # Optimizer steps done; the next step is this number, counting from 0.
    step: int = 0
    # Tokens of documents (BOS and EOS included, system prompts not) and target tokens trained so far.
    tokens: int = 0
    targets: int = 0
    tokens_by_source: dict[str, int] = field(default_factory=dict)
    # Steps whose update was left out because its gradients were not finite.
    skipped: list[int] = field(default_factory=list)
    # Seconds spent in training steps and in evaluation.
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    # Held-out losses of the last evaluation; None where one is no finite number.
    heldout: dict[str, float | None] = field(default_factory=dict)
    # A stop came into the evaluation that follows this step; it has to be made again.
    evaluation_pending: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "LoopState":
        return cls(**value)
