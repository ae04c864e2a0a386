"""What accelerators can do and what training asks of them: speed and FLOPs, room and bytes.

One home for the estimate before a run and for what the run decides by them. Standard library only.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Peak bf16 matrix FLOP/s without sparsity, and bytes of memory, from the vendor's data sheet."""

    flops: float
    memory: int


# Part of the memory that weights and activations may take; the rest is for buffers and gaps.
USABLE = 0.9

# Loss is taken over pieces of the rows of which the logits fit in this.
LOGITS_BYTES = 256 << 20

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


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while it trains."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits

    def fits(self, room: float) -> bool:
        """Whether a device with `room` bytes can train so."""
        return self.total <= USABLE * room


@dataclass(frozen=True)
class Demand:
    """What training asks of each of `devices` alike: `tokens` at once, in numbers of `item` bytes.

    `trained` of the `parameters` are not frozen.
    """

    parameters: int
    trained: int
    layers: int
    width: int
    vocabulary: int
    tokens: int
    item: int
    devices: int

    def memory(self, *, recomputed: bool) -> Memory:
        """32-bit weights, of the trained ones also gradients and AdamW's two moments, all of them
        shared between the devices; each device's activations; logits in 32 bits, their gradient.
        """
        return Memory(
            weights=4 * self.parameters // self.devices,
            gradients=4 * self.trained // self.devices,
            optimizer=8 * self.trained // self.devices,
            activations=activation_bytes(
                self.tokens, self.width, self.layers, self.item, recomputed
            ),
            logits=min(2 * 4 * self.tokens * self.vocabulary, LOGITS_BYTES),
        )

    def recomputed(self, setting: str, room: float | None) -> bool:
        """Whether activations are recomputed on devices with `room` bytes, by the job's setting.

        Auto: where they would not fit otherwise; not where nothing is known of the devices.
        """
        if setting == "Auto":
            return room is not None and not self.memory(recomputed=False).fits(room)
        return setting == "Full"


def activation_bytes(tokens: int, width: int, layers: int, item: int, recomputed: bool) -> int:
    """Bytes of all activations of `tokens` on one device, in numbers of `item` bytes.

    arXiv 2205.05198 (equation 2), without attention scores, which are never kept: a layer's are 34
    bytes a token and unit of width in 16 bits, so 17 numbers. `recomputed`: of each layer its input
    is kept, and of the one at hand all.
    """
    unit = item * tokens * width
    return layers * unit + 17 * unit if recomputed else layers * 17 * unit
