"""The strict bridge from the mutable `ConfigDict` of the command line to frozen dataclasses.

A default lives once, in its dataclass: `to_config_dict(TrainConfig())` puts it where a config file
and the command line can change it, and `build(TrainConfig, cfg)` checks every key and type on the
way back. `cfg` is always the mutable side, `config` the frozen one.

A field is an int, float, bool or str, a Literal, a tuple[X, ...] of these, a dataclass, or a union of
dataclasses, told apart by their default of `type`. Every field has a default.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict


def build(cls, cfg: Mapping, name: str = ""):
    """Builds the frozen dataclass `cls` from `cfg`, nested dataclasses included.

    A key that `cfg` lacks takes the default of the dataclass. An int is taken for a float, a list
    for a tuple; nothing else is converted.

    Args:
      cfg: a ConfigDict, or any mapping (a config read back from JSON).
      name: where `cfg` sits in the whole config (`train`), for messages.

    Raises ValueError for an unknown key, with the nearest known one; for a value of the wrong type; and for
    whatever the dataclass itself refuses.
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
    except ValueError as error:  # it names its field, which here has the name of its flag
        field = str(error).partition("=")[0]
        raise ValueError(_join(name, str(error)) if field in hints else str(error)) from error


def to_config_dict(config) -> ConfigDict:
    """The mutable ConfigDict of a dataclass instance, typed so that overrides are checked."""
    values = {name: getattr(config, name) for name in _hints(type(config))}
    return ConfigDict(
        {name: to_config_dict(x) if dataclasses.is_dataclass(x) else x for name, x in values.items()}
    )


def override(cls, cfg: ConfigDict, values: Mapping[str, Any]) -> None:
    """Sets keys of `cfg`, {"loss.type": "gbce", "loss.num_negatives": 64}: types first, for they choose which
    keys there are.

    cls: the dataclass of the whole config. Raises ValueError as `switch_type`, KeyError for an unknown key.
    """
    for name, value in values.items():
        if name.endswith(".type"):
            switch_type(cls, cfg, name.removesuffix(".type"), value)
    cfg.update_from_flattened_dict(values)


def switch_type(cls, cfg: ConfigDict, section: str, new: str) -> None:
    """Makes `cfg.section` the config of another type: what the new type has too keeps the value that `cfg`
    gives it, where that is not the default of the old type; all else is at the new type's defaults.

    cls: the dataclass of the whole config. section: the name of a field; where that is no union of
    dataclasses, its `type` is a value like any other and nothing happens.
    Raises ValueError for a type that is unknown.
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
    """The dataclasses that a value of the annotated type can be."""
    return tuple(option for option in (typing.get_args(hint) or (hint,)) if dataclasses.is_dataclass(option))


def _convert(value: Any, hint: Any, name: str, owner: str):
    """`value` as the annotated type `hint`, or a ValueError that names the field `name`."""
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
    is_bool = isinstance(value, bool)  # an int to Python, a mistake to a user
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
