"""Flags of a config: types choose the keys of a section, and unknown keys get a hint."""

import pathlib

import pytest
from absl import flags as absl_flags

from experiments.launch import _models_with, define_config

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:the load_module")  # raised by ml_collections


@pytest.mark.parametrize(
    "flags, text, hint",
    [
        (["--config.model.conv_width=3"], "'conv_width'", "models esasrec, lru, not of this config's"),
        (["--config.model.width=8", "--config.model.widht=8"], 'widht: Did you mean "width"?', ""),
        (["--config.model.width=8", "--config.model.time_bias=True"], "'time_bias'", "models hstu, not"),
        (["--config.train.conv_width=3", "--config.model.width=8"], "'conv_width'", ""),
        (["--config.train.width=3", "--config.model.width=8"], "'width'", ""),
    ],
)
def test_an_unknown_key_names_the_models_that_have_it(flags, text, hint):
    message = _models_with(["train", *flags], text)
    assert hint in message and bool(hint) == bool(message)


@pytest.mark.parametrize(
    "flags, expected",
    [
        (
            ["--config.loss.num_negatives=64", "--config.loss.type=sampled_softmax"],  # in any order
            {"loss": {"type": "sampled_softmax", "num_negatives": 64, "sampler": "uniform"}},
        ),
        (["--config.loss.type", "gbce"], {"loss": {"type": "gbce", "calibration": 0.75}}),
        (
            ["--config.model.type=hstu", "--config.model.time_bias=False"],
            {"model": {"type": "hstu", "time_bias": False, "dropout": 0.3, "width": 128}},  # as in the config
        ),
        (["--config.data.format=csv"], {"data": {"format": "csv"}, "loss": {"type": "softmax"}}),
    ],
)
def test_a_type_chooses_the_keys_of_its_section(flags, expected, monkeypatch):
    flag_values, argv = absl_flags.FlagValues(), ["train", "--config=configs/sasrec_ml1m.py", *flags]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.chdir(ROOT)
    holder = define_config("A config.", flag_values)
    flag_values(argv)
    for section, values in expected.items():
        assert {key: holder.value[section][key] for key in values} == values


def test_an_unknown_type_is_refused(monkeypatch):
    argv = ["train", "--config=configs/sasrec_ml1m.py", "--config.loss.type=gbcee"]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.chdir(ROOT)
    flag_values = absl_flags.FlagValues()
    define_config("A config.", flag_values)
    with pytest.raises((ValueError, absl_flags.IllegalFlagValueError), match="did you mean 'gbce'"):
        flag_values(argv)


@pytest.mark.parametrize(
    "path, message",
    [
        ("configs/log.py:hst", "variant 'hst': unknown model 'hst'; use sasrec, bert4rec"),
        ("configs/lgo.py", "there is no file configs/lgo.py"),
    ],
)
def test_a_config_that_cannot_be_loaded_ends_with_one_line(path, message, monkeypatch):
    argv = ["train", f"--config={path}"]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.chdir(ROOT)
    flag_values = absl_flags.FlagValues()
    define_config("A config.", flag_values)
    with pytest.raises(SystemExit, match=message):
        flag_values(argv)
