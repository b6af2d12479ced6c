"""Eight virtual CPU devices for every test, so that meshes are real without an accelerator."""

import os
import pathlib

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# No time limits on examples: a busy machine must not fail a test.
hypothesis.settings.register_profile("rec_jax", deadline=None)
hypothesis.settings.load_profile("rec_jax")


@pytest.fixture
def real_data():
    """The folder of real data sets, from REC_JAX_DATA; skips where it is not set."""
    root = os.environ.get("REC_JAX_DATA")
    if not root:
        pytest.skip("REC_JAX_DATA is not set: no real data sets here")
    return pathlib.Path(root)
