"""BERT4Rec: a bidirectional transformer that learns to predict masked items from the events around them."""

from dataclasses import dataclass
from typing import Literal

import flax.nnx as nnx
import jax.numpy as jnp

from rec_jax.hashing import Site, words
from rec_jax.models.sasrec import SASRec, SASRecConfig
from rec_jax.nn.dims import named


@dataclass(frozen=True, kw_only=True)
class BERT4RecConfig(SASRecConfig):
    type: Literal["bert4rec"] = "bert4rec"
    activation: Literal["relu", "gelu", "silu"] = "gelu"
    mask_share: float = 0.2  # probability that an item is masked
    last_share: float = 0.1  # share of the histories in which only the last item is masked, as in evaluation

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.mask_share <= 1:
            raise ValueError(f"mask_share={self.mask_share} must be in (0, 1] (BERT4RecConfig)")
        if not 0 <= self.last_share <= 1:
            raise ValueError(f"last_share={self.last_share} must be in [0, 1] (BERT4RecConfig)")


class BERT4Rec(SASRec):
    """SASRec's transformer with attention in both directions, over histories with masked items.

    Source: Sun et al., CIKM'19 (arXiv 1904.06690), sections 3.5 and 3.6.
    Differs: scores are dot products with the item embedding table, without the projection and the bias per
    item of their equation 7; masks are drawn anew in every epoch.
    """

    is_causal = False

    def __init__(self, config: BERT4RecConfig, num_items: int, max_len: int, *, rngs: nnx.Rngs):
        super().__init__(config, num_items, max_len, rngs=rngs)
        mask = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (config.table_dim,)))
        self.mask = named(mask, config.table_dim_name)

    def look_up(self, batch):
        x_BSD = super().look_up(batch)
        return jnp.where(batch.is_query[..., None], self.mask[...].astype(x_BSD.dtype), x_BSD)

    def training_batch(self, batch, key_B):
        """Masks items, which become the targets."""
        segments_BS, positions_BS = batch.segments, batch.positions
        shape = segments_BS.shape[1:]
        is_real_BS = segments_BS > 0
        following_BS = jnp.pad(positions_BS[:, 1:], ((0, 0), (0, 1)))
        is_last_BS = is_real_BS & (following_BS == 0)
        masked_BS = words(key_B, Site.MASKED, shape) < _threshold(self.config.mask_share)
        # One random number per segment, the one at its first token.
        draws_BS = words(key_B, Site.MASKED_LAST, shape)
        first_BS = jnp.arange(shape[0]) - positions_BS
        last_only_BS = jnp.take_along_axis(draws_BS, first_BS, axis=1) < _threshold(self.config.last_share)
        masked_BS = is_real_BS & jnp.where(last_only_BS, is_last_BS, masked_BS)
        targets_BS = jnp.where(masked_BS, batch.items, 0)
        return batch.hide(masked_BS).replace(is_query=masked_BS).with_targets(targets_BS)


def _threshold(share: float):
    """Threshold t with P(uint32 < t) = share."""
    return jnp.uint32(min(int(share * 2**32), 2**32 - 1))
