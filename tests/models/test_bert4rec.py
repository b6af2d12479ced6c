"""What BERT4Rec masks, and what it sees. Its blocks are those of SASRec."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.data.batch import Batch
from rec_jax.hashing import row_keys
from rec_jax.models.base import init_model
from rec_jax.models.bert4rec import BERT4Rec, BERT4RecConfig

NUM_ITEMS, MAX_LEN = 20, 12


def make(**kwargs):
    config = BERT4RecConfig(**({"width": 8, "ff_width": 12, "num_heads": 2, "dropout": 0.0} | kwargs))
    return init_model(lambda rngs: BERT4Rec(config, NUM_ITEMS, MAX_LEN, rngs=rngs), seed=0)


def rows(num_rows=1):
    """Segments of 5 and 4 tokens, then padding; every item differs from its neighbours."""
    items = np.zeros((num_rows, MAX_LEN), np.int32)
    items[:, :9] = np.arange(1, 10) + np.arange(num_rows)[:, None] % 10
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3] * num_rows, np.int32)
    positions = np.array([[*range(5), *range(4), 0, 0, 0]] * num_rows, np.int32)
    return Batch({"item": items}, segments, positions, next={"item": items})


def masked_batch(model, params, num_rows):
    key_B = row_keys(jnp.uint32(7), jnp.arange(num_rows))
    batch = model.bind(params).training_batch(rows(num_rows), key_B)
    return jax.tree.map(np.asarray, batch)


def test_masks_a_share_of_the_items_and_asks_for_these():
    model, params = make(mask_share=0.3, last_share=0.0)
    batch = masked_batch(model, params, 2_000)
    masked, items = batch.is_query, rows(2_000).items
    np.testing.assert_array_equal(batch.targets, np.where(masked, items, 0))
    np.testing.assert_array_equal(batch.items, np.where(masked, 0, items))
    assert not masked[:, 9:].any()  # padding
    shares = masked[:, :9].mean(axis=0)
    np.testing.assert_allclose(shares, 0.3, atol=0.04)  # 4 standard deviations
    assert abs(np.corrcoef(masked[:, 0], masked[:, 1])[0, 1]) < 0.1


def test_a_share_of_the_histories_is_asked_for_the_last_item_alone():
    model, params = make(mask_share=1.0, last_share=0.25)
    masked = masked_batch(model, params, 2_000).is_query
    for inside, last in ((slice(0, 5), 4), (slice(5, 9), 8)):
        part = masked[:, inside]
        is_whole = part.all(axis=1)
        assert part[~is_whole].sum(axis=1).max() == 1 and masked[:, last].all()
        np.testing.assert_allclose((~is_whole).mean(), 0.25, atol=0.04)
    both = ~masked[:, 0] & ~masked[:, 5]
    np.testing.assert_allclose(both.mean(), 0.25**2, atol=0.025)  # segments are drawn apart


def test_a_masked_item_cannot_be_seen_and_both_sides_can():
    model, params = make()
    batch = rows().replace(is_query=np.arange(MAX_LEN)[None] == 2)

    @jax.jit
    def encode(batch):
        return model.bind(params)(batch)[0]

    def changed(query_positions):
        other = batch.with_items(np.where(np.arange(MAX_LEN) == query_positions, 19, batch.items))
        return np.any(np.asarray(encode(other)) != np.asarray(encode(batch)), axis=-1)

    assert not changed(2).any()
    for query_positions in (0, 4):
        np.testing.assert_array_equal(changed(query_positions)[:9], [True] * 5 + [False] * 4)


@pytest.mark.parametrize("kwargs", [{"mask_share": 0.0}, {"mask_share": 1.1}, {"last_share": -0.1}])
def test_bad_shares_are_named(kwargs):
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))}=.*BERT4RecConfig"):
        BERT4RecConfig(**kwargs)
