"""Eight virtual CPU devices for every test, so that meshes are real without an accelerator."""

import os
import pathlib

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def real_data():
    """The folder of real data sets, from REC_JAX_DATA; skips where it is not set."""
    root = os.environ.get("REC_JAX_DATA")
    if not root:
        pytest.skip("REC_JAX_DATA is not set: no real data sets here")
    return pathlib.Path(root)
