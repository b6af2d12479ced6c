"""The strict bridge from the mutable `ConfigDict` of the command line to frozen dataclasses.

A default lives once, in its dataclass: `to_config_dict(TrainConfig())` puts it where a config file
and the command line can change it, and `build(TrainConfig, cfg)` checks every key and type on the
way back. `cfg` is always the mutable side, `config` the frozen one.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from ml_collections import ConfigDict, config_dict


def build(cls, cfg: Mapping, name: str = ""):
    """Builds the frozen dataclass `cls` from `cfg`, nested dataclasses included; of a union of them the key
    `type` chooses.

    A key that `cfg` lacks takes the default of the dataclass. An int is taken for a float, a list
    for a tuple; nothing else is converted.

    Args:
      cls: the dataclass to build.
      cfg: a ConfigDict, or any mapping (a config read back from JSON).
      name: where `cfg` sits in the whole config (`train`), for messages.

    Raises:
      ValueError: an unknown key, with the nearest known one; a missing key without a default; a
        value of the wrong type; whatever the dataclass itself refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    values = {}
    for key in cfg:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f"did you mean {_join(name, near[0])}?" if near else f"it has {', '.join(fields)}"
            raise ValueError(f"unknown key {_join(name, key)} ({cls.__name__}): {hint}")
        values[key] = _convert(cfg[key], hints[key], _join(name, key), cls.__name__)
    for key, field in fields.items():
        if key not in values and _has_no_default(field):
            raise ValueError(f"{_join(name, key)} is missing ({cls.__name__}) and has no default")
    try:
        return cls(**values)
    except ValueError as error:  # it names its field, which here has the name of its flag
        field = str(error).partition("=")[0]
        raise ValueError(_join(name, str(error)) if field in fields else str(error)) from error


def to_config_dict(config) -> ConfigDict:
    """The mutable ConfigDict of a dataclass instance, typed so that overrides are checked."""
    hints = typing.get_type_hints(type(config))
    cfg = ConfigDict()
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_config_dict(value)
        elif value is None:  # A placeholder keeps the type, so that the flag can be parsed.
            value = config_dict.placeholder(_placeholder_type(hints[field.name]))
        elif isinstance(value, Mapping):
            value = ConfigDict(dict(value))
        cfg[field.name] = value
    return cfg


def switch_type(cls, cfg: ConfigDict, section: str, new: str) -> None:
    """Makes `cfg.section` the config of another type: what the new type has too keeps the value that `cfg`
    gives it, where that is not the default of the old type; all else is at the new type's defaults.

    cls: the dataclass of the whole config. section: a field that is a union of dataclasses, "loss".
    Raises ValueError for a field that has no types, and for a type that is unknown.
    """
    *parents, name = section.split(".")
    for parent in parents:
        cls, cfg = typing.get_type_hints(cls)[parent], cfg[parent]
    classes = typing.get_args(typing.get_type_hints(cls).get(name))
    by_type = {option.type: option for option in classes if dataclasses.is_dataclass(option)}
    if not by_type:
        return  # a `type` that is a value like any other
    if new not in by_type:
        near = difflib.get_close_matches(new, by_type, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{section}.type={new!r} is not one of {', '.join(by_type)}{hint}")
    old = cfg[name]
    if old.type == new:
        return
    defaults, switched = to_config_dict(by_type[old.type]()), to_config_dict(by_type[new]())
    for key in switched:
        if key != "type" and key in old and old[key] != defaults[key]:
            switched[key] = old[key]
    cfg[name] = switched


def _convert(value: Any, hint: Any, name: str, owner: str):
    """`value` as the annotated type `hint`, or a ValueError that names the field `name`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = ValueError(
        f"{name}={value!r} is {_article(type(value).__name__)}, expected {_describe(hint)} ({owner})"
    )
    if hint is Any:
        return value
    if origin is Literal:
        if not any(value == arg and type(value) is type(arg) for arg in args):
            near = difflib.get_close_matches(str(value), [str(arg) for arg in args], n=1)
            hint_text = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name}={value!r} is not one of {_describe(hint)} ({owner}){hint_text}")
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, args, name, owner, wrong)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping | ConfigDict):
            raise wrong
        return build(hint, value, name)
    if hint is tuple or origin is tuple:
        return _convert_tuple(value, args, name, owner, wrong)
    if hint is dict or origin in (dict, Mapping):
        if not isinstance(value, Mapping | ConfigDict):
            raise wrong
        key_hint, value_hint = args or (Any, Any)
        return {
            _convert(k, key_hint, f"key of {name}", owner): _convert(
                value[k], value_hint, _join(name, str(k)), owner
            )
            for k in value
        }
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, bool):  # bool is an int to Python, a mistake to a user.
        raise wrong
    if hint is None or hint is type(None):
        if value is not None:
            raise wrong
        return None
    if not isinstance(value, hint):
        raise wrong
    return value


def _convert_union(value, args, name: str, owner: str, wrong: ValueError):
    if value is None and type(None) in args:
        return None
    if all(dataclasses.is_dataclass(arg) for arg in args):
        return _build_named(value, args, name, wrong)
    others = [arg for arg in args if arg is not type(None)]
    if len(others) == 1:
        return _convert(value, others[0], name, owner)
    for arg in sorted(others, key=lambda arg: type(value) is not arg):  # The exact type first.
        try:
            return _convert(value, arg, name, owner)
        except ValueError:
            continue
    raise wrong


def _build_named(value, classes, name: str, wrong: ValueError):
    """One of several dataclasses, told apart by their default of `type`."""
    if isinstance(value, classes):
        return value
    if not isinstance(value, Mapping | ConfigDict):
        raise wrong
    by_type = {cls.type: cls for cls in classes}
    asked = value["type"] if "type" in value else classes[0].type
    if asked not in by_type:
        near = difflib.get_close_matches(str(asked), by_type, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{_join(name, 'type')}={asked!r} is not one of {', '.join(by_type)}{hint}")
    return build(by_type[asked], value, name)


def _convert_tuple(value, args, name: str, owner: str, wrong: ValueError) -> tuple:
    if not isinstance(value, tuple | list):
        raise wrong
    if not args:
        return tuple(value)
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(args) != len(value):
        raise wrong
    return tuple(
        _convert(item, arg, f"{name}[{i}]", owner)
        for i, (item, arg) in enumerate(zip(value, args, strict=True))
    )


def _has_no_default(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _placeholder_type(hint) -> type:
    """The type that an optional field has once it is set."""
    for arg in typing.get_args(hint):
        if arg is type(None):
            continue
        if typing.get_origin(arg) is Literal:
            return type(typing.get_args(arg)[0])
        return typing.get_origin(arg) or arg
    return object


def _describe(hint) -> str:
    if typing.get_origin(hint) is Literal:
        return ", ".join(repr(arg) for arg in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
