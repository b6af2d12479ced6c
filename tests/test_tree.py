import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.tree import cast_floats, leaf_mask, leaf_names, num_params

TREE = {
    "items": {"embedding": jnp.ones((3, 2))},
    "blocks": {0: {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
    "step": jnp.zeros((), jnp.int32),
}


def test_leaf_names_are_paths_of_keys():
    assert set(leaf_names(TREE)) == {"items/embedding", "blocks/0/kernel", "blocks/0/bias", "step"}
    assert leaf_names(TREE)["blocks/0/bias"].shape == (2,)


def test_leaf_mask_matches_whole_names():
    mask = leaf_names(leaf_mask(TREE, r"blocks/\d+/(kernel|bias)", field="names"))
    assert [name for name, is_match in mask.items() if is_match] == ["blocks/0/bias", "blocks/0/kernel"]
    with pytest.raises(ValueError, match="names='kernel' matches no parameter.*blocks/0/kernel"):
        leaf_mask(TREE, "kernel", field="names")


def test_cast_floats_leaves_integers_unchanged():
    cast = cast_floats(TREE, jnp.bfloat16)
    assert cast["items"]["embedding"].dtype == jnp.bfloat16
    assert cast["step"].dtype == np.int32


def test_num_params_counts_elements():
    assert num_params(TREE) == 3 * 2 + 2 * 2 + 2 + 1
