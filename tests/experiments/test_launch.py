"""What is said of a key that a config does not have."""

import pytest

from experiments.launch import _models_with


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
def test_models_that_have_the_key(flags, text, hint):
    found = _models_with(["train", *flags], text)
    assert hint in found and bool(hint) == bool(found)
