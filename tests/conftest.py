"""Eight virtual CPU devices for every test, so that meshes are real without an accelerator."""

import importlib.metadata
import os
import pathlib

# Tests compile far more than they compute, and run most of it once: LLVM's passes are left out, and fused
# loops are emitted the older way where XLA still has it, in half the time. Without FMA products are rounded
# before they are added: what two programs both compute is then the same to the bit. Set before JAX is
# imported; the commands that tests start inherit it. A flag that XLA does not know ends the process, so a
# release of jaxlib that was never tried gets none, and takes longer.
if importlib.metadata.version("jaxlib").startswith(("0.10.", "0.12.")):
    flags = "--xla_backend_optimization_level=0 --xla_cpu_max_isa=AVX"
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ.setdefault("XLA_FLAGS", flags)

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# The commands that tests start compile much the same programs: they share what they compiled. Tests compile
# for themselves, for some read what the compiler says.
jax.config.update("jax_enable_compilation_cache", False)
# No time limits on examples: a busy machine must not fail a test.
hypothesis.settings.register_profile("rec_jax", deadline=None)
hypothesis.settings.load_profile("rec_jax")


def pytest_configure(config):
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def pytest_collection_modifyitems(items):
    """Commands and training first: no worker shall be left alone with a long file at the end."""
    long = ("tests/experiments/", "tests/train/", "tests/test_recipes.py")
    items.sort(key=lambda item: not item.nodeid.startswith(long))


@pytest.fixture
def real_data():
    """The folder of real data sets, from REC_JAX_DATA; skips where it is not set."""
    root = os.environ.get("REC_JAX_DATA")
    if not root:
        pytest.skip("REC_JAX_DATA is not set: no real data sets here")
    return pathlib.Path(root)
