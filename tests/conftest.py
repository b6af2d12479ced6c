"""Settings of all tests: eight virtual CPU devices, to test meshes on any machine, and fast compilation."""

import importlib.metadata
import os
import pathlib

# Tests spend most of their time compiling programs that run once. So LLVM's optimization passes are off, and
# the older emitters of fused loops are used where XLA still has them, which halves the time. To let two
# programs that compute the same value agree bit for bit, fused multiply-adds (FMA) are off as well. The flags
# must be set before JAX is imported; commands that tests start inherit them. An unknown flag ends the
# process: releases of jaxlib with which they were not tried run without them and take longer.
if importlib.metadata.version("jaxlib").startswith(("0.10.", "0.12.")):
    flags = "--xla_backend_optimization_level=0 --xla_cpu_max_isa=AVX"
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ.setdefault("XLA_FLAGS", flags)

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# The commands that tests start share a compilation cache, because they compile many of the same programs. The
# test process itself does not use it, because some tests check the output of the compiler.
jax.config.update("jax_enable_compilation_cache", False)
# No time limits on examples: a busy machine must not fail a test.
hypothesis.settings.register_profile("rec_jax", deadline=None)
hypothesis.settings.load_profile("rec_jax")


def pytest_configure(config):
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def pytest_collection_modifyitems(items):
    """Runs the slow files first, so that parallel workers finish at about the same time."""
    long = ("tests/experiments/", "tests/train/", "tests/test_recipes.py")
    items.sort(key=lambda item: not item.nodeid.startswith(long))


@pytest.fixture
def real_data():
    """The folder of real data sets, from REC_JAX_DATA. Skips the test if that is not set."""
    root = os.environ.get("REC_JAX_DATA")
    if not root:
        pytest.skip("REC_JAX_DATA is not set: set it to the folder of real data sets")
    return pathlib.Path(root)
