"""Walking the types: which fields a model has, by the names that a manifest uses."""

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

# A place in a document: names of fields, and numbers of list items.
Path = tuple[str | int, ...]


def show(path: Path) -> str:
    """`spec.datasets[2].weight`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """A model's fields by their camelCase names."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def attribute(model: type[BaseModel], alias: str) -> str:
    """The Python name of a field."""
    for name, field in model.model_fields.items():
        if alias == (field.alias or name):
            return name
    raise KeyError(f"{model.__name__} has no field {alias}")


def bare(annotation: Any) -> Any:
    """An annotation without `Annotated` and without `| None`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return bare(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        others = [each for each in get_args(annotation) if each is not type(None)]
        if len(others) == 1:
            return bare(others[0])
    return annotation


def item(annotation: Any) -> Any:
    """The type of a list's items, or None when it is no list."""
    kind = bare(annotation)
    return bare(get_args(kind)[0]) if get_origin(kind) is tuple else None


def values(annotation: Any) -> Any:
    """The type of a mapping's values, or None when it is no mapping."""
    kind = bare(annotation)
    return get_args(kind)[1] if get_origin(kind) is dict else None


def as_model(annotation: Any) -> type[BaseModel] | None:
    """The model behind an annotation, if there is one."""
    kind = bare(annotation)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def annotation_at(root: type[BaseModel], path: Path) -> Any:
    """The annotation of the field at `path`, or None where the types know no such field."""
    here: Any = root
    for part in path:
        if isinstance(part, int):
            here = item(here)
            continue
        model = as_model(here)
        known = fields(model) if model else {}
        here = known[part].annotation if part in known else values(here)
    return here


def field_at(root: type[BaseModel], path: Path) -> FieldInfo | None:
    """The field that the last name in `path` stands for."""
    if not path or not isinstance(path[-1], str):
        return None
    model = as_model(annotation_at(root, path[:-1]))
    return fields(model).get(path[-1]) if model else None


def parts(place: str) -> Path:
    """`spec.datasets[].storageUri` as names; -1 stands for every item."""
    return tuple(part for name in place.split(".") if name for part in _steps(name))


def _steps(name: str) -> Iterator[str | int]:
    yield name.removesuffix("[]")
    if name.endswith("[]"):
        yield -1


def instances(value: Any, place: Path, above: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value at `place` (as `parts` makes it) in a model or in a plain document.

    What is left out is passed over.
    """
    if not place:
        yield above, value
        return
    first, rest = place[0], place[1:]
    if first == -1:
        if isinstance(value, Sequence) and not isinstance(value, str):
            for index, each in enumerate(value):
                yield from instances(each, rest, (*above, index))
        return
    child = _child(value, str(first))
    if child is not None:
        yield from instances(child, rest, (*above, first))


def _child(value: Any, name: str) -> Any:
    if isinstance(value, BaseModel):
        return getattr(value, attribute(type(value), name))
    return value.get(name) if isinstance(value, Mapping) else None
