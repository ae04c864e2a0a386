"""The smallest merge patch (RFC 7386) that makes one document into another."""

from collections.abc import Mapping
from typing import Any


def patch(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What differs: null for what goes, whole lists, mappings part by part. Empty: nothing."""
    found: dict[str, Any] = {key: None for key in before if key not in after}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            inner = patch(old, value)
            if inner:
                found[key] = inner
        elif key not in before or old != value:
            found[key] = value
    return found
