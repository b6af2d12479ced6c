import dataclasses
import json
from typing import Literal

import pytest
from ml_collections import ConfigDict

from configs import log
from rec_jax.config import build, switch_type, to_config_dict
from rec_jax.models.registry import MODELS
from rec_jax.run_config import ExperimentConfig


@dataclasses.dataclass(frozen=True)
class InnerConfig:
    width: int = 64
    rate: float = 0.5
    kind: Literal["learned", "rotary"] = "learned"

    def __post_init__(self):
        if self.width % 2:
            raise ValueError(f"width={self.width} is odd (InnerConfig)")


@dataclasses.dataclass(frozen=True)
class CatConfig:
    type: Literal["cat"] = "cat"
    age: int = 1
    lives: int = 9


@dataclasses.dataclass(frozen=True)
class DogConfig:
    type: Literal["dog"] = "dog"
    age: int = 1


@dataclasses.dataclass(frozen=True)
class OuterConfig:
    name: str = "run"
    debug: bool = False
    ks: tuple[int, ...] = (5, 10)
    betas: tuple[float, ...] = (0.9, 0.98)
    inner: InnerConfig = InnerConfig()
    animal: CatConfig | DogConfig = CatConfig()


def test_a_config_survives_a_round_trip():
    config = OuterConfig(ks=(1,), inner=InnerConfig(width=8, rate=0.25, kind="rotary"))
    assert build(OuterConfig, to_config_dict(config)) == config
    assert build(OuterConfig, to_config_dict(OuterConfig())) == OuterConfig()


def test_a_config_survives_a_round_trip_through_json():
    cfg = to_config_dict(OuterConfig())
    assert build(OuterConfig, json.loads(cfg.to_json())) == OuterConfig()


def test_missing_keys_take_the_default():
    assert build(OuterConfig, ConfigDict()) == OuterConfig()
    assert build(OuterConfig, {"inner": {"width": 2}}).inner == InnerConfig(width=2)


def test_an_int_given_for_a_float_becomes_a_float():
    cfg = to_config_dict(OuterConfig())
    cfg.inner.rate = 1
    cfg.ks = (1, 2, 3)
    config = build(OuterConfig, cfg)
    assert config.ks == (1, 2, 3)
    assert config.inner.rate == 1.0 and isinstance(config.inner.rate, float)


def test_a_list_becomes_a_tuple():
    assert build(OuterConfig, {"ks": [1, 2], "betas": [0, 1]}) == OuterConfig(ks=(1, 2), betas=(0.0, 1.0))


def test_type_selects_the_dataclass_of_a_union():
    assert build(OuterConfig, {"animal": {"type": "dog", "age": 3}}).animal == DogConfig(age=3)
    assert build(OuterConfig, {"animal": {"lives": 3}}).animal == CatConfig(lives=3)


def test_switch_type_keeps_values_that_were_set():
    cfg = to_config_dict(OuterConfig(animal=CatConfig(age=5)))
    switch_type(OuterConfig, cfg, "animal", "dog")
    assert build(OuterConfig, cfg).animal == DogConfig(age=5)
    switch_type(OuterConfig, cfg, "name", "any")  # not a union
    with pytest.raises(ValueError, match=r"animal\.type='cta' is not one of .*did you mean 'cat'"):
        switch_type(OuterConfig, cfg, "animal", "cta")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"inner": {"widht": 3}}, r"unknown key inner\.widht .*did you mean inner\.width"),
        ({"inner": {"width": 3}}, r"^inner\.width=3 is odd \(InnerConfig\)"),
        ({"zzzzzz": 3}, r"unknown key zzzzzz \(OuterConfig\): it has name, debug"),
        ({"name": 3}, r"name=3 is an int, expected str \(OuterConfig\)"),
        ({"debug": 1}, r"debug=1 is an int, expected bool"),
        ({"inner": {"width": True}}, r"inner\.width=True is a bool, expected int"),
        ({"inner": {"width": 4.0}}, r"inner\.width=4\.0 is a float, expected int"),
        ({"inner": {"width": "4"}}, r"inner\.width='4' is a str, expected int"),
        ({"inner": {"rate": None}}, r"inner\.rate=None is a NoneType, expected float"),
        ({"inner": {"rate": True}}, r"inner\.rate=True is a bool, expected float"),
        ({"inner": {"kind": "rotery"}}, r"inner\.kind='rotery' is not one of .*'rotary'\?"),
        ({"inner": 3}, r"inner=3 is an int, expected InnerConfig"),
        ({"animal": {"type": "cow"}}, r"animal\.type='cow' is not one of 'cat', 'dog'"),
        ({"animal": {"type": "dog", "lives": 3}}, r"unknown key animal\.lives \(DogConfig\)"),
        ({"animal": 3}, r"animal=3 is an int, expected .*CatConfig \| .*DogConfig"),
        ({"ks": 5}, r"ks=5 is an int, expected tuple\[int, \.\.\.\]"),
        ({"ks": (5, "x")}, r"ks\[1\]='x' is a str, expected int"),
    ],
)
def test_errors_name_field_and_value(values, message):
    with pytest.raises(ValueError, match=message):
        build(OuterConfig, ConfigDict(values))


@pytest.mark.parametrize("model", [config.type for config in MODELS])
def test_the_config_for_a_log_of_your_own_has_every_model_type(model):
    cfg = log.get_config(model)
    cfg.data.path = "log.csv"
    config = build(ExperimentConfig, cfg)
    assert config.model.type == model and config.train.patience > 0
    assert build(ExperimentConfig, log.get_config(f"{model}-smoke")).data.format == "simulator"


def test_an_unknown_model_type_is_refused():
    with pytest.raises(ValueError, match="variant 'hst': unknown model 'hst'; use sasrec, bert4rec, esasrec"):
        log.get_config("hst")
