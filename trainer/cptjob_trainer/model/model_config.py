"""What a model's config.json says, under the many names that architectures use."""

from typing import Any

# Where a configuration says how many positions the model has, in the order they are tried.
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "seq_length",
    "max_sequence_length",
)
_WIDTHS = ("hidden_size", "n_embd", "d_model")


def max_positions(config: dict[str, Any]) -> int | None:
    """The longest row that the model has positions for; None where it has no limit of its own."""
    return first_number(config, _POSITIONS)


def vocab_size(config: dict[str, Any]) -> int | None:
    """Rows of the embedding table."""
    return first_number(config, ("vocab_size",))


def embedding_width(config: dict[str, Any]) -> int | None:
    """Columns of the embedding table, which a few architectures project to the width of a layer."""
    names = ("word_embed_proj_dim", "input_embedding_size", "embedding_size", *_WIDTHS)
    return first_number(config, names)


def width(config: dict[str, Any]) -> int | None:
    """Hidden units between two layers."""
    return first_number(config, _WIDTHS)


def layers(config: dict[str, Any]) -> int | None:
    """Layers of the decoder."""
    return first_number(config, ("num_hidden_layers", "n_layer", "num_layers", "n_layers"))


def first_number(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of `names` in the configuration, or in the part of it that is about text."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        for name in names:
            value = part.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
