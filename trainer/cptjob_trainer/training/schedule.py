"""Learning rate as a pure function of how much of the run is done.

Every schedule warms up linearly from `learning_rate / warmup_steps` to `learning_rate`, and ends at
`min_learning_rate` at the last step. Continued pre-training wants both ends: re-warming and
re-decaying the rate is what recovers a pre-trained model on new data (arXiv 2403.08763).
"""

import math

# Share of a WSD run that decays; MiniCPM (arXiv 2404.06395) finds about a tenth to be enough.
WSD_DECAY_SHARE = 0.1
# Warm-up when the manifest gives none, as a share of the run and at most this many steps.
WARMUP_SHARE = 0.01
WARMUP_LIMIT = 2000


def default_warmup(total_steps: int) -> int:
    """Steps of warm-up for a run that does not name them: 1 % of it, from 1 up to 2000."""
    return max(1, min(WARMUP_LIMIT, round(WARMUP_SHARE * total_steps)))


def learning_rate(
    kind: str,
    step: int,
    total_steps: int,
    *,
    peak: float,
    floor: float,
    warmup_steps: int,
    constant_steps: int = 0,
) -> float:
    """Learning rate of 0-based optimizer step `step` out of `total_steps`.

    kind: Constant, Linear, Cosine or WSD (warm-up, stable, decay). `constant_steps` holds the peak
    for that many steps after the warm-up before Linear and Cosine begin to decay; WSD holds it until
    the last tenth of the run. The last step runs at `floor` exactly, except with Constant.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if kind == "Constant":
        return peak
    hold = warmup_steps + constant_steps
    if kind == "WSD":
        hold = max(hold, total_steps - max(1, round(WSD_DECAY_SHARE * total_steps)))
    if step < hold:
        return peak
    # 0 at the last step at full rate, 1 at the last step of the run.
    decay_steps = max(1, total_steps - hold)
    share = min(1.0, (step - hold + 1) / decay_steps)
    if kind == "Cosine":
        share = 0.5 * (1.0 - math.cos(math.pi * share))
    elif kind not in ("Linear", "WSD"):
        raise ValueError(f"unknown schedule {kind!r}")
    return peak + (floor - peak) * share
