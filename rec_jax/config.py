"""Conversion between the mutable `ConfigDict` of the command line and frozen dataclasses, with strict checks.

Each default is written once, in its dataclass. `to_config_dict(TrainConfig())` copies the defaults into a
`ConfigDict` that a config file and the command line can change. `build(TrainConfig, cfg)` checks every key
and type on the way back. `cfg` is always the mutable `ConfigDict`, `config` the frozen dataclass.

A field is an int, float, bool or str, a Literal, a tuple[X, ...] of these, a dataclass, or a union of
dataclasses, which are distinguished by the default of their field `type`. Every field has a default.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict


def build(cls, cfg: Mapping, name: str = ""):
    """Builds the frozen dataclass `cls` from `cfg`, including nested dataclasses.

    A key that is missing in `cfg` takes the default of the dataclass. An int is accepted for a float and a
    list for a tuple; nothing else is converted.

    Args:
      cfg: a ConfigDict, or any mapping (a config read back from JSON).
      name: path of `cfg` in the whole config (`train`), for error messages.

    Raises ValueError for an unknown key (naming the closest known key), for a value of the wrong type, and
    for values that the dataclass itself refuses.
    """
    hints = _hints(cls)
    values = {}
    for key in cfg:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            hint = f"did you mean {_join(name, near[0])}?" if near else f"it has {', '.join(hints)}"
            raise ValueError(f"unknown key {_join(name, key)} ({cls.__name__}): {hint}")
        values[key] = _convert(cfg[key], hints[key], _join(name, key), cls.__name__)
    try:
        return cls(**values)
    except ValueError as error:  # its message begins with the field: put the path of the section before it
        field = str(error).partition("=")[0]
        raise ValueError(_join(name, str(error)) if field in hints else str(error)) from error


def to_config_dict(config) -> ConfigDict:
    """Returns a dataclass instance as a mutable ConfigDict, typed so that overrides are checked."""
    values = {name: getattr(config, name) for name in _hints(type(config))}
    return ConfigDict(
        {name: to_config_dict(x) if dataclasses.is_dataclass(x) else x for name, x in values.items()}
    )


def override(cls, cfg: ConfigDict, values: Mapping[str, Any]) -> None:
    """Sets keys of `cfg`, as in {"loss.type": "gbce", "loss.num_negatives": 64}. Types are set first, because
    they determine which keys a section has.

    cls: the dataclass of the whole config. Raises ValueError as `switch_type`, KeyError for an unknown key.
    """
    for name, value in values.items():
        if name.endswith(".type"):
            switch_type(cls, cfg, name.removesuffix(".type"), value)
    cfg.update_from_flattened_dict(values)


def switch_type(cls, cfg: ConfigDict, section: str, new: str) -> None:
    """Replaces `cfg.section` by the config of another type. A key that both types have keeps its value if
    that differs from the old type's default; every other key gets the new type's default.

    cls: the dataclass of the whole config. section: the name of a field. If the field is not a union of
    dataclasses, its `type` is an ordinary value and nothing happens.
    Raises ValueError for an unknown type.
    """
    classes = _dataclasses_of(_hints(cls).get(section))
    if len(classes) < 2:
        return
    by_type = {option.type: option for option in classes}
    _check_choice(f"{section}.type", new, by_type)
    old = cfg[section]
    if old.type == new:
        return
    defaults, switched = to_config_dict(by_type[old.type]()), to_config_dict(by_type[new]())
    for key in switched:
        if key != "type" and key in old and old[key] != defaults[key]:
            switched[key] = old[key]
    cfg[section] = switched


def _hints(cls) -> dict[str, Any]:
    """{field: its annotated type}."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _dataclasses_of(hint) -> tuple:
    """The dataclasses among the options of an annotated type."""
    return tuple(option for option in (typing.get_args(hint) or (hint,)) if dataclasses.is_dataclass(option))


def _convert(value: Any, hint: Any, name: str, owner: str):
    """Returns `value` as the annotated type `hint`. Raises ValueError, naming the field, if it cannot."""
    origin, args, classes = typing.get_origin(hint), typing.get_args(hint), _dataclasses_of(hint)
    if origin is Literal:
        _check_choice(name, value, args, f" ({owner})")
        return value
    if classes and isinstance(value, Mapping | ConfigDict):
        chosen = classes[0]
        if len(classes) > 1 and "type" in value:
            by_type = {option.type: option for option in classes}
            _check_choice(f"{name}.type", value["type"], by_type)
            chosen = by_type[value["type"]]
        return build(chosen, value, name)
    if origin is tuple and isinstance(value, tuple | list):
        return tuple(_convert(item, args[0], f"{name}[{i}]", owner) for i, item in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    is_bool = isinstance(value, bool)  # Python accepts a bool as an int; in a config that is a mistake
    if origin is not tuple and isinstance(value, classes or hint) and is_bool == (hint is bool):
        return value
    kind = type(value).__name__
    article = "an" if kind[0] in "aeiou" else "a"
    expected = hint if args or not isinstance(hint, type) else hint.__name__
    raise ValueError(f"{name}={value!r} is {article} {kind}, expected {expected} ({owner})")


def _check_choice(name: str, value, choices, where: str = "") -> None:
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        near = difflib.get_close_matches(str(value), map(str, choices), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name}={value!r} is not one of {listed}{where}{hint}")


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
