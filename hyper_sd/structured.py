"""The strict step from a composed yaml to frozen dataclasses. Imports no torch.

Every value is checked against its annotation; a mistake is a ValueError that names the full key, what was given and what is allowed.
"""

import dataclasses
import difflib
import importlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Bounds of a number, for `Annotated[int, Range(low=1)]`; an open end is excluded."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        above, below = ">" if self.open_low else ">=", "<" if self.open_high else "<="
        return f"{above} {self.low:g}" + (f" and {below} {self.high:g}" if self.high < math.inf else "")


Count = Annotated[int, Range(low=1)]
NonNegativeInt = Annotated[int, Range(low=0)]
Positive = Annotated[float, Range(low=0, open_low=True)]
NonNegative = Annotated[float, Range(low=0)]
Beta = Annotated[float, Range(low=0, high=1, open_high=True)]


def resolved(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as plain dicts and lists with every ${...} replaced."""
    try:
        plain = OmegaConf.to_container(OmegaConf.create(cfg), resolve=True)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def structured(cls: type[T], mapping: object, key: str = "") -> T:
    """Build the dataclass `cls` from a mapping, checking every value against its annotation. Raises ValueError naming `key`.<field>."""
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{key}: {describe(mapping)}, expected a mapping with the keys {', '.join(_field_names(cls))}")
    refuse_unknown(mapping, _field_names(cls), key)
    hints, values = get_type_hints(cls, include_extras=True), {}
    for item in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        value = mapping.get(item.name, "???")
        if value != "???":
            values[item.name] = _checked(hints[item.name], value, _join(key, item.name))
        elif item.name in mapping or (item.default is MISSING and item.default_factory is MISSING):
            raise ValueError(f"{_join(key, item.name)}: must be set, expected {_expected(hints[item.name], null=False)}")
    return cls(**values)


def build_target(mapping: Mapping[str, Any], key: str) -> Any:
    """Build the dataclass named by `_target_` from the other keys of the mapping. Imports the module, so it may import torch."""
    path = checked_target(mapping, key)
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"{key}._target_: cannot find {path!r}: {error}") from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ValueError(f"{key}._target_: {path!r} is not a dataclass")
    return structured(cls, {name: value for name, value in mapping.items() if name != "_target_"}, key)


def nearest(word: str, allowed: Iterable[str], similar: float = 0.5) -> str | None:
    """The most similar allowed word, if one is at least `similar`, between 0 and 1."""
    matches = difflib.get_close_matches(word, list(allowed), n=1, cutoff=similar)
    return matches[0] if matches else None


def checked_target(mapping: Mapping[str, Any], key: str) -> str:
    """The `_target_` of a mapping. Raises ValueError unless it is a full name in this package."""
    path = mapping.get("_target_")
    if not isinstance(path, str) or not path.startswith("hyper_sd.") or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"{key}._target_: {describe(path)}, expected the full name of a dataclass of this package (hyper_sd.…)")
    return path


def refuse_unknown(mapping: Mapping[str, Any], known: Iterable[str], key: str) -> None:
    """Raise ValueError for a name that is not known, with the nearest one that is."""
    known = list(known)
    for name in mapping:
        if name not in known:
            raise ValueError(f"{_join(key, str(name))}: unknown key{suggestion(str(name), known)}")


def suggestion(word: str, allowed: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest allowed one, and all of them."""
    allowed = list(allowed)
    match = nearest(word, allowed)
    return (f"; did you mean {match}?" if match else ";") + f" Allowed here: {', '.join(allowed)}"


def _checked(kind: Any, value: Any, key: str) -> Any:
    """`value` as an instance of the annotation `kind`: lists become tuples, ints become floats where a float is expected."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _checked_range(kind, value, key)
    if origin in (Union, UnionType):
        return _checked_union(kind, value, key)
    if dataclasses.is_dataclass(kind):
        return structured(kind, value, key)  # pyright: ignore[reportArgumentType]
    if origin is tuple and isinstance(value, list | tuple):
        return _checked_tuple(kind, value, key)
    if origin is dict and isinstance(value, Mapping):
        return {name: _checked(args[1], item, _join(key, str(name))) for name, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Any or (origin is Literal and value in args) or (kind is NoneType and value is None):
        return value
    if isinstance(kind, type) and origin is None and type(value) is kind and not (kind is float and not math.isfinite(value)):
        return value
    raise ValueError(f"{key}: {describe(value)}, expected {_expected(kind)}")


def _checked_range(kind: Any, value: Any, key: str) -> Any:
    number, bounds = get_args(kind)
    try:
        result = _checked(number, value, key)
    except ValueError:
        result = None
    if result is None or not bounds.holds(result):
        raise ValueError(f"{key}: {describe(value)}, expected {_expected(kind)}")
    return result


def _checked_union(kind: Any, value: Any, key: str) -> Any:
    members = get_args(kind)
    if value is None and NoneType in members:
        return None
    concrete = [member for member in members if member is not NoneType]
    if len(concrete) == 1 and isinstance(value, Mapping):
        return _checked(concrete[0], value, key)  # the error should name the nested key
    for member in concrete:
        try:
            return _checked(member, value, key)
        except ValueError:
            continue
    raise ValueError(f"{key}: {describe(value)}, expected {_expected(kind)}")


def _checked_tuple(kind: Any, value: list[Any] | tuple[Any, ...], key: str) -> tuple[Any, ...]:
    args = get_args(kind)
    if args[-1] is Ellipsis:
        return tuple(_checked(args[0], item, f"{key}[{index}]") for index, item in enumerate(value))
    if len(value) != len(args):
        raise ValueError(f"{key}: {describe(value)}, expected {_expected(kind)}")
    return tuple(_checked(arg, item, f"{key}[{index}]") for index, (arg, item) in enumerate(zip(args, value, strict=True)))


def _expected(kind: Any, *, null: bool = True) -> str:
    """An annotation in a user's words; `null=False` leaves out that null is allowed."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return f"{_expected(args[0])} {args[1]}"
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
    if origin in (Union, UnionType):
        return " or ".join(_expected(arg) for arg in args if null or arg is not NoneType)
    if origin is tuple:
        return "a list of " + ("" if Ellipsis in args else f"{len(args)}, each ") + _expected(args[0])
    if dataclasses.is_dataclass(kind):
        return f"a mapping with the keys {', '.join(_field_names(kind))}"
    return {NoneType: "null", dict: "a mapping"}.get(origin or kind, getattr(kind, "__name__", str(kind)))


def describe(value: Any) -> str:
    """A value that was given, in a message."""
    return "got null" if value is None else f"got {value!r} ({type(value).__name__})"


def _field_names(cls: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(cls)]


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
