"""BERT4Rec: masks, targets, and attention in both directions. Its blocks are those of SASRec."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import random_params

from rec_jax.data.batch import Batch
from rec_jax.hashing import row_keys
from rec_jax.models.base import define_model
from rec_jax.models.bert4rec import BERT4Rec, BERT4RecConfig

NUM_ITEMS, MAX_LEN = 20, 12


def make(**kwargs):
    config = BERT4RecConfig(**({"width": 8, "ff_width": 12, "num_heads": 2, "dropout": 0.0} | kwargs))
    model = define_model(lambda rngs: BERT4Rec(config, NUM_ITEMS, MAX_LEN, rngs=rngs))
    return model, jax.tree.map(jnp.asarray, random_params(model))


def rows(num_rows=1):
    """Returns a batch whose rows have segments of 5 and 4 tokens, then padding; neighbouring items differ."""
    items = np.zeros((num_rows, MAX_LEN), np.int32)
    items[:, :9] = np.arange(1, 10) + np.arange(num_rows)[:, None] % 10
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3] * num_rows, np.int32)
    positions = np.array([[*range(5), *range(4), 0, 0, 0]] * num_rows, np.int32)
    return Batch({"item": items}, segments, positions, next={"item": items})


def masked_batch(model, params, num_rows):
    @jax.jit
    def mask(batch):
        key_B = row_keys(jnp.uint32(7), jnp.arange(num_rows))
        return model.bind(params).training_batch(batch, key_B)

    return jax.tree.map(np.asarray, mask(rows(num_rows)))


def test_a_share_of_the_items_is_masked_and_becomes_the_targets():
    model, params = make(mask_share=0.3, last_share=0.0)
    batch = masked_batch(model, params, 2_000)
    is_masked, items = batch.is_query, rows(2_000).items
    np.testing.assert_array_equal(batch.targets, np.where(is_masked, items, 0))
    np.testing.assert_array_equal(batch.items, np.where(is_masked, 0, items))
    assert not is_masked[:, 9:].any()  # padding
    shares = is_masked[:, :9].mean(axis=0)
    np.testing.assert_allclose(shares, 0.3, atol=0.04)  # 4 standard deviations
    assert abs(np.corrcoef(is_masked[:, 0], is_masked[:, 1])[0, 1]) < 0.1


def test_in_a_share_of_the_histories_only_the_last_item_is_masked():
    model, params = make(mask_share=1.0, last_share=0.25)
    is_masked = masked_batch(model, params, 2_000).is_query
    for inside, last in ((slice(0, 5), 4), (slice(5, 9), 8)):
        segment = is_masked[:, inside]
        all_masked = segment.all(axis=1)
        assert segment[~all_masked].sum(axis=1).max() == 1 and is_masked[:, last].all()
        np.testing.assert_allclose((~all_masked).mean(), 0.25, atol=0.04)
    last_only_twice = ~is_masked[:, 0] & ~is_masked[:, 5]
    np.testing.assert_allclose(last_only_twice.mean(), 0.25**2, atol=0.025)  # segments are independent


def test_masked_items_are_not_used_and_both_directions_are():
    model, params = make(num_layers=1)
    batch = rows().replace(is_query=np.arange(MAX_LEN)[None] == 2)

    @jax.jit
    def encode(batch):
        return model.bind(params)(batch)[0]

    def changes_with(position):
        """Returns bool[S]: whether the output at each token depends on the item at a position."""
        other = batch.with_items(np.where(np.arange(MAX_LEN) == position, 19, batch.items))
        return np.any(np.asarray(encode(other)) != np.asarray(encode(batch)), axis=-1)

    assert not changes_with(2).any()
    for position in (0, 4):
        np.testing.assert_array_equal(changes_with(position)[:9], [True] * 5 + [False] * 4)


@pytest.mark.parametrize("kwargs", [{"mask_share": 0.0}, {"mask_share": 1.1}, {"last_share": -0.1}])
def test_invalid_shares_are_refused(kwargs):
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))}=.*BERT4RecConfig"):
        BERT4RecConfig(**kwargs)
