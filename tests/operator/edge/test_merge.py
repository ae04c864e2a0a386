"""A merge patch makes one status into the other, and is empty when they are equal."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cptjob_operator.edge.merge import patch

_values = st.recursive(
    st.booleans() | st.integers(0, 3) | st.text("ab", max_size=2),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3)
    ),
    max_leaves=8,
)
_documents = st.dictionaries(st.sampled_from("abcd"), _values, max_size=4)


def applied(target: Any, change: Any) -> Any:
    """RFC 7386, section 2."""
    if not isinstance(change, dict):
        return change
    target = dict(target) if isinstance(target, dict) else {}
    for key, value in change.items():
        if value is None:
            target.pop(key, None)
        else:
            target[key] = applied(target.get(key), value)
    return target


@given(_documents, _documents)
def test_a_patch_leads_from_one_to_the_other(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert applied(before, patch(before, after)) == after


@given(_documents)
def test_nothing_differs_from_itself(value: dict[str, Any]) -> None:
    assert patch(value, value) == {}
