"""What accelerators can do and what training asks of them: peak speed, memory, FLOPs of a token.

One table for the estimate before a run and for the utilisation during it. Standard library only.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Peak bf16 matrix FLOP/s without sparsity, and bytes of memory, from the vendor's data sheet."""

    flops: float
    memory: int


# A name that holds another stands before it.
DEVICES = {
    "H200": Device(989e12, 141_000_000_000),
    "H100": Device(989e12, 80_000_000_000),
    "A100-80GB": Device(312e12, 80_000_000_000),
    "A100": Device(312e12, 40_000_000_000),
    "L40S": Device(362e12, 48_000_000_000),
    "L4": Device(121e12, 24_000_000_000),
    "V100": Device(125e12, 16_000_000_000),
}


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of a device by the name that its driver gives; None when it is not in the table."""
    found = (
        each.flops for name, each in DEVICES.items() if re.search(f"{name}(?!\\d)", device_name)
    )
    return next(found, None)


def flops_per_token(
    parameters: int, layers: int, width: int, length: int, *, frozen: bool = False
) -> float:
    """Training FLOPs of one token in a row of `length`: 6 per parameter, and 6 * layers * width *
    length for causal scores.

    PaLM (arXiv 2204.02311, appendix B) counts 12 * layers * width * length for full attention; a
    causal mask computes half of it. `frozen`: only adapters are trained, so the weights need no
    gradients of their own, which leaves 4 per parameter.
    """
    return (4.0 if frozen else 6.0) * parameters + 6.0 * layers * width * length
