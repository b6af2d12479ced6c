"""A model in one file: what is read back is what was written, and a damaged file is said to be so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.compress import artifact
from rec_jax.compress.quant import QuantConfig, quantize_params
from rec_jax.models.base import init_model
from rec_jax.models.sasrec import SASRec, SASRecConfig
from rec_jax.tree import cast_floats


@pytest.fixture(scope="module")
def params():
    config = SASRecConfig(width=32, ff_width=32)
    return init_model(lambda rngs: SASRec(config, 300, 8, rngs=rngs), seed=0)[1]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def pruned(params):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.where(rng.uniform(size=x.shape) < 0.7, 0, x), params)


@pytest.mark.parametrize("bits", [8, 4])
def test_everything_comes_back_bit_for_bit(params, tmp_path, bits):
    quant = QuantConfig(names=".*(kernel|embedding)", inputs="dynamic", table_bits=bits, symmetric=False)
    half = cast_floats(params, jnp.bfloat16)
    for given in (params, pruned(params), half, quantize_params(params, quant), pruned(half)):
        artifact.save(tmp_path, given)
        assert_same(artifact.load(tmp_path), given)


def test_integers_take_the_bytes_of_integers_and_zeros_hardly_any(params, tmp_path):
    whole = artifact.save(tmp_path, params)
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    assert 0.85 < whole / num_bytes < 1.1  # random numbers hardly compress
    quant = QuantConfig(names=".*(kernel|embedding)")
    integers = quantize_params(params, quant)
    assert {x.dtype for x in jax.tree.leaves(integers, is_leaf=lambda x: hasattr(x, "dtype"))} >= {
        jnp.dtype("int8"), jnp.dtype("bfloat16"), jnp.dtype("float32"),
    }  # fmt: skip
    assert artifact.save(tmp_path, integers) < 0.35 * whole
    assert artifact.save(tmp_path, pruned(params)) < 0.42 * whole
    assert artifact.save(tmp_path, quantize_params(pruned(params), quant)) < 0.2 * whole


def test_a_file_that_is_not_whole_is_named(params, tmp_path):
    artifact.save(tmp_path, params)
    path = tmp_path / artifact.NAME
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:1000] + b"x" * 50 + whole[1050:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.npz cannot be read back"):
            artifact.load(tmp_path)


def test_a_write_that_fails_leaves_the_old_file(params, tmp_path, monkeypatch):
    artifact.save(tmp_path, params)

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="no space"):
        artifact.save(tmp_path, pruned(params))
    monkeypatch.undo()
    assert_same(artifact.load(tmp_path), params)
