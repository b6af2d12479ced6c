"""SASRec: self-attentive sequential recommendation, a causal transformer over packed histories."""

from dataclasses import dataclass
from typing import Literal

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from rec_jax.nn.blocks import TransformerBlock
from rec_jax.nn.dropout import dropout
from rec_jax.nn.embedding import Embedding
from rec_jax.nn.norm import LayerNorm


@dataclass(frozen=True)
class SASRecConfig:
    type: Literal["sasrec"] = "sasrec"
    width: int = 64
    num_layers: int = 2
    num_heads: int = 1
    ff_width: int = 64
    activation: Literal["relu", "gelu", "silu"] = "relu"
    dropout: float = 0.1
    norm: Literal["pre", "post", "original"] = "post"
    position: Literal["learned", "rotary"] = "learned"
    l2_normalize: bool = False  # score by cosine: both sides normalised to length 1
    temperature: float = 1.0  # scores are divided by it

    def __post_init__(self):
        for name, least in (("width", 1), ("num_layers", 0), ("num_heads", 1), ("ff_width", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least} (SASRecConfig)")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide width={self.width} (SASRecConfig)")
        if self.position == "rotary" and self.width // self.num_heads % 2:
            raise ValueError(
                f"width/num_heads={self.width // self.num_heads} must be even for "
                "position='rotary' (SASRecConfig)"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1) (SASRecConfig)")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive (SASRecConfig)")


class SASRec(nnx.Module):
    """Encodes histories and scores the catalogue with the tied item table.

    Source: Kang & McAuley, ICDM'18 (arXiv 1808.09781).
    Differs: positions count from the start of the (truncated) history instead of from its end; no
    dropout on attention weights; norm="post", which scored best, unless the original order is asked for.
    """

    def __init__(self, config: SASRecConfig, num_items: int, max_len: int, *, rngs: nnx.Rngs):
        self.config = config
        self.items = Embedding(num_items + 1, config.width, rngs=rngs)
        if config.position == "learned":
            self.positions = Embedding(max_len, config.width, rngs=rngs)
        self.blocks = nnx.List(
            [TransformerBlock(config, index, rngs=rngs) for index in range(config.num_layers)]
        )
        self.final_norm = LayerNorm(config.width)

    def __call__(self, batch: dict[str, jax.Array], key_B: jax.Array | None = None, at=None) -> jax.Array:
        """Encodes packed rows.

        batch: items, segments, positions, each int32[B, S] (segment 0 = padding).
        key_B: uint32[B] from `hashing.row_keys`, or None for no dropout.
        at: (rows int[Q], columns int[Q]) of the only tokens that are asked for, without dropout; or None.
        Returns x_BSD, or x_QD for `at`, scaled so that a dot product with `item_vectors()` is the score.
        """
        config = self.config
        x_BSD = self.items(batch["items"]) * config.width**0.5
        if config.position == "learned":
            x_BSD = x_BSD + self.positions(batch["positions"])
        if key_B is not None and config.dropout:
            x_BSD = dropout(x_BSD, key_B, 0, config.dropout)
        rotary_BS = batch["positions"] if config.position == "rotary" else None
        for block in self.blocks:
            last = block is self.blocks[-1]
            x_BSD = block(x_BSD, batch["segments"], rotary_BS, key_B, at if last else None)
        x = self.final_norm(x_BSD)
        if config.l2_normalize:
            x = _unit(x)
        return x / config.temperature

    def item_vectors(self) -> jax.Array:
        """The catalogue as table_VD; row 0 is padding and must not be scored."""
        table_VD = self.items.embedding[...]
        return _unit(table_VD) if self.config.l2_normalize else table_VD


def _unit(x):
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.sum(x32**2, -1, keepdims=True) + 1e-12)).astype(x.dtype)
