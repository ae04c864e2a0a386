"""The proof that documents of one row do not see each other.

Architectures that carry state along the row (Bloom's biases, Mamba's recurrence) mix the documents,
whatever the attention, so nothing is believed: two documents are run packed and alone.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cptjob_trainer.model import attention

# Packed and alone differ by rounding only; a leak is of the size of the logits themselves.
TOLERANCE = 2e-3
PROBE_LENGTHS = (9, 14)
PROBE_WINDOW = 4


def _probe_documents(vocabulary: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and positions [1, n] of two documents, the same ones every time."""
    generator = torch.Generator().manual_seed(20240917)
    return [
        (torch.randint(0, vocabulary, (1, n), generator=generator), torch.arange(n).unsqueeze(0))
        for n in PROBE_LENGTHS
    ]


def _logits(lm: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    device = next(lm.parameters()).device
    ours = lm.config._attn_implementation == attention.NAME
    borders = attention.document_arguments(positions, device) if ours else {}
    out = lm(
        input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False, **borders
    )
    logits: torch.Tensor = out.logits.float()
    return logits


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    scale = other.abs().max().clamp_min(1e-6)
    return float(((one - other).abs().max() / scale).item())


def leak(lm: Any) -> float:
    """Largest change of the logits of two documents when they share a row, relative to their scale.

    inf for a model that takes no positions. Call it in eval mode and without gradients.
    """
    if not attention.accepts_positions(lm):
        return float("inf")
    documents = _probe_documents(lm.get_input_embeddings().weight.shape[0])
    ids, positions = (torch.cat(parts, dim=1) for parts in zip(*documents, strict=True))
    try:
        alone = torch.cat([_logits(lm, *document) for document in documents], dim=1)
        return _difference(_logits(lm, ids, positions), alone)
    except (TypeError, ValueError, RuntimeError):
        return float("inf")


@contextlib.contextmanager
def _narrowed(lm: Any) -> Iterator[None]:
    """Windows and chunks of a few tokens for a while, so that a short document shows them.

    Some architectures tell their window to the attention, others put it into the mask alone, which
    `packed_attention` never sees. Set in both places, it makes no difference only to the former.
    """
    changed = []
    for owner in (lm.config, *lm.modules()):
        for name in ("sliding_window", "attention_chunk_size"):
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > PROBE_WINDOW:
                changed.append((owner, name, value))
                setattr(owner, name, PROBE_WINDOW)
    try:
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def _agrees(lm: Any, default: str) -> bool:
    """Whether `packed_attention` computes what the implementation `default` does, on one document."""
    document = _probe_documents(lm.get_input_embeddings().weight.shape[0])[1]
    with _narrowed(lm):
        lm.set_attn_implementation(default)
        expected = _logits(lm, *document)
        lm.set_attn_implementation(attention.NAME)
        try:
            return _difference(_logits(lm, *document), expected) < TOLERANCE
        except (TypeError, ValueError, RuntimeError):
            return False


def settle(lm: Any) -> bool:
    """Choose the model's attention for packed rows; False when its documents cannot be kept apart.

    `packed_attention` where it computes the same as the model's own, else the model's own.
    """
    attention.register()
    default = lm.config._attn_implementation
    was_training = lm.training
    lm.eval()
    try:
        with torch.no_grad():
            if not attention.accepts_positions(lm):
                return False
            if (
                getattr(lm, "_supports_attention_backend", False)
                and _agrees(lm, default)
                and leak(lm) < TOLERANCE
            ):
                return True
            lm.set_attn_implementation(default)
            return leak(lm) < TOLERANCE
    finally:
        lm.train(was_training)


def probe_config(config: Any) -> Any:
    """The same architecture with few layers and a small vocabulary, to be probed with random weights."""
    small = copy.deepcopy(config)
    kinds = list(getattr(small, "layer_types", None) or [])
    # Enough layers that every kind of layer (sliding, full, linear, ...) is there.
    keep = max((kinds.index(kind) for kind in set(kinds)), default=1) + 1
    keep = min(keep, int(small.num_hidden_layers))
    with contextlib.suppress(AttributeError):  # some configs derive it from the number of layers
        if kinds:
            small.layer_types = kinds[:keep]
    small.num_hidden_layers = keep
    small.vocab_size = min(int(small.vocab_size), 512)
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(small, token, None) is not None:
            setattr(small, token, 0)
    return small


def packs(model_dir: Path) -> bool:
    """Whether documents of this architecture may share a row, found by trying it on random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small = probe_config(config)
            return settle(AutoModelForCausalLM.from_config(small, dtype=torch.float32))
    except (TypeError, ValueError, AttributeError, RuntimeError):
        # An architecture that cannot be shrunk is trained unpacked rather than guessed at.
        return False
