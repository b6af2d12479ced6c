"""SASRec: self-attentive sequential recommendation, a causal transformer over packed histories."""

from dataclasses import dataclass
from typing import Literal

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from rec_jax.models.base import SequenceConfig, SequenceModel
from rec_jax.nn.blocks import TransformerBlock, TransformerShape
from rec_jax.nn.context import Block
from rec_jax.nn.dense import dense
from rec_jax.nn.dims import named
from rec_jax.nn.experts import Mixture
from rec_jax.nn.norm import LayerNorm
from rec_jax.tables.embedding import Embedding


@dataclass(frozen=True, kw_only=True)
class SASRecConfig(SequenceConfig):
    type: Literal["sasrec"] = "sasrec"
    num_heads: int = 1
    ff_width: int = 64
    activation: Literal["relu", "gelu", "silu"] = "relu"
    norm: Literal["pre", "post", "original"] = "post"
    position: Literal["learned", "rotary"] = "learned"
    item_dim: int = 0  # dims of the item embedding table; a kernel projects them to width and back; 0 = width
    share_layers: bool = False  # one block, applied num_layers times
    head_width: int = 0  # dims of a head; 0 = width / num_heads. Set after pruning of heads or dims
    num_experts: int = 0  # feed-forwards per layer, of which a router picks a few per token; 0 = a plain one
    experts_per_token: int = 2
    capacity_factor: float = 1.25  # most tokens that an expert takes in training, relative to an even split
    balance_weight: float = 0.01  # weight, per real token, of the loss that balances tokens over experts

    def __post_init__(self):
        super().__post_init__()
        self.check_minimums(num_heads=1, ff_width=1, item_dim=0, head_width=0, num_experts=0)
        if not self.head_width and self.width % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide width={self.width}: change one of them, or set "
                "head_width (SASRecConfig)"
            )
        head_width = self.head_width or self.width // self.num_heads
        if self.position == "rotary" and head_width % 2:
            raise ValueError(
                f"head_width={head_width} (by default width/num_heads) must be even for "
                "position='rotary' (SASRecConfig)"
            )
        if self.item_dim and self.l2_normalize:
            raise ValueError(
                f"item_dim={self.item_dim} is not supported with l2_normalize, because the projection "
                "changes the lengths of vectors: turn one of them off (SASRecConfig)"
            )
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must be from 1 to num_experts="
                f"{self.num_experts}: change one of them (SASRecConfig)"
            )
        if self.capacity_factor <= 0:
            raise ValueError(f"capacity_factor={self.capacity_factor} must be positive (SASRecConfig)")
        if self.balance_weight < 0:
            raise ValueError(
                f"balance_weight={self.balance_weight} must not be negative; 0 turns it off (SASRecConfig)"
            )

    @property
    def table_dim(self) -> int:
        return self.item_dim or self.width

    @property
    def table_dim_name(self) -> str:
        return "item_dim" if self.item_dim else "width"

    @property
    def fixed_layers(self) -> str:
        if self.share_layers:
            return "all layers share one block"
        if self.norm != "pre":
            return f"with norm={self.norm!r} a layer also normalises its residual branch"
        return ""

    def block_shape(self, is_causal: bool) -> TransformerShape:
        mixture = None
        if self.num_experts:
            mixture = Mixture(
                self.num_experts, self.experts_per_token, self.capacity_factor, self.balance_weight
            )
        return TransformerShape(
            width=self.width,
            num_heads=self.num_heads,
            head_width=self.head_width or self.width // self.num_heads,
            ff_width=self.ff_width,
            activation=self.activation,
            dropout=self.dropout,
            norm=self.norm,
            full_width=self.full_width,
            is_causal=is_causal,
            is_rotary=self.position == "rotary",
            mixture=mixture,
        )


class SASRec(SequenceModel):
    """A causal transformer, with one item embedding table for inputs and scores.

    Source: Kang & McAuley, ICDM'18 (arXiv 1808.09781); item_dim and share_layers: ALBERT, Lan et al., ICLR'20
    (arXiv 1909.11942), section 3.1.
    Differs: positions count from the start of the (truncated) history instead of from its end; no
    dropout on attention weights; norm="post" by default, which scored best, instead of norm="original".
    """

    def __init__(self, config: SASRecConfig, num_items: int, max_len: int, *, rngs: nnx.Rngs):
        self.config = config
        self.items = named(
            Embedding(num_items + 1, config.table_dim, rngs=rngs), "items", config.table_dim_name
        )
        if config.position == "learned":
            self.positions = named(Embedding(max_len, config.width, rngs=rngs), "positions", "width")
        num_blocks = min(1, config.num_layers) if config.share_layers else config.num_layers
        self.blocks = nnx.List([self.make_block(rngs) for _ in range(num_blocks)])
        self.final_norm = LayerNorm(config.width, config.full_width)
        if config.item_dim:
            # Variance 1 / item_dim: initial inputs are as large as those without a projection.
            init = nnx.initializers.lecun_normal()
            project = nnx.Linear(config.item_dim, config.width, use_bias=False, kernel_init=init, rngs=rngs)
            self.project = named(project, "item_dim", "width")

    def make_block(self, rngs: nnx.Rngs) -> Block:
        return TransformerBlock(self.config.block_shape(self.is_causal), rngs=rngs)

    @property
    def stack(self) -> list[Block]:
        return [self.blocks[0]] * self.config.num_layers if self.config.share_layers else list(self.blocks)

    def inputs(self, batch):
        config, x = self.config, self.look_up(batch)
        if config.item_dim:
            x_TD = dense(x.reshape(-1, config.item_dim), self.project.kernel[...])
            x = x_TD.reshape(*x.shape[:2], config.width)
        x = x * (config.full_width or config.width) ** 0.5
        return x if self.positions is None else x + self.positions(batch.positions)

    def read_out(self, x):
        """Returns query vectors, of item_dim dims if that is set."""
        x = self.final_norm(x)
        return self.queries(_transposed(x, self.project.kernel[...]) if self.config.item_dim else x)


def _transposed(x, kernel_ED):
    """Returns x @ kernel.T. A kernel that is not an array (see `nn.dense.dense`) has
    `matmul_transposed(x)`."""
    if isinstance(kernel_ED, jax.Array):
        return jnp.dot(x, kernel_ED.T.astype(x.dtype))
    return kernel_ED.matmul_transposed(x)
