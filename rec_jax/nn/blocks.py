"""Transformer blocks of the sequence models."""

import flax.nnx as nnx
from jax.sharding import PartitionSpec as P

from rec_jax.nn.attention import SelfAttention
from rec_jax.nn.dense import Dense
from rec_jax.nn.dropout import dropout
from rec_jax.nn.experts import Experts, feed_forward
from rec_jax.nn.norm import LayerNorm
from rec_jax.nn.parallel import join, to_parts


class FeedForward(nnx.Module):
    """Two dense layers with a non-linearity between them."""

    def __init__(self, width: int, ff_width: int, activation: str, *, rngs: nnx.Rngs):
        init = nnx.initializers.xavier_uniform()
        self.up = Dense(width, ff_width, kernel_init=init, rngs=rngs)
        self.down = Dense(ff_width, width, kernel_init=init, rngs=rngs)
        self.activation = activation

    def __call__(self, x_BSD):
        is_split = self.up.kernel.shape[1] < self.up.out_features  # over "model", by channels
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        hidden_TF = getattr(nnx, self.activation)(self.up(to_parts(x_TD) if is_split else x_TD))
        return join(self.down, hidden_TF, is_split).reshape(x_BSD.shape)


def attention_of(config, *, is_causal: bool, rngs: nnx.Rngs) -> SelfAttention:
    """The self-attention that a model's config describes."""
    return SelfAttention(
        config.width,
        config.num_heads,
        config.head_width or config.width // config.num_heads,
        is_causal=is_causal,
        is_rotary=config.position == "rotary",
        rngs=rngs,
    )


class TransformerBlock(nnx.Module):
    """Attention then feed-forward, each with a residual.

    norm="pre": x + f(norm(x)), twice.
    norm="post": norm(x) + f(norm(x)), twice: what follows a residual sum is always its normalised form.
    norm="original": SASRec's own order: as "post", but keys and values see the input before the norm.
    """

    def __init__(self, config, *, is_causal: bool = True, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(config.width, config.full_width)
        self.attention = attention_of(config, is_causal=is_causal, rngs=rngs)
        self.ff_norm = LayerNorm(config.width, config.full_width)
        if config.num_experts:
            self.ff = Experts(config, rngs=rngs)
        else:
            self.ff = FeedForward(config.width, config.ff_width, config.activation, rngs=rngs)
        self.norm, self.rate = config.norm, config.dropout

    def __call__(self, x_BSD, segments_BS, positions_BS, key_B, index: int, at=None, penalties=None):
        """index: which layer this is, for its dropout: a block may be several of them. at: (rows, columns) of
        the only tokens to return, as x_QD; None for all of x_BSD. penalties: see SequenceModel."""

        def drop(x, site):
            if key_B is None or self.rate == 0:
                return x
            return dropout(x, key_B, 2 * index + site, self.rate)

        normed = self.attention_norm(x_BSD)
        residual = x_BSD if self.norm == "pre" else normed
        memory = x_BSD if self.norm == "original" else normed
        x_BSD = residual + drop(self.attention(normed, memory, segments_BS, positions_BS), 1)
        x = x_BSD if at is None else x_BSD[at]  # the rest of the block looks at one token at a time
        normed = self.ff_norm(x)
        residual = x if self.norm == "pre" else normed
        return residual + drop(feed_forward(self.ff, normed, segments_BS, key_B, penalties), 2)


def tensor_parallel(num_heads: int, ff_width: int, parts: int, num_experts: int = 0) -> dict[str, P]:
    """{regex of a parameter's name: how it lies over the mesh axis "model" of `parts` devices}.

    Attention is split by heads, the feed-forward by channels and a mixture by experts, where these can be
    divided; else they are whole.
    """
    split = {}
    if parts > 1 and num_heads % parts == 0:
        split |= {
            r".*attention/query/kernel": P(None, "model"),
            r".*attention/query/bias": P("model"),
            r".*attention/key_value/kernel": P(None, None, "model"),
            r".*attention/key_value/bias": P(None, "model"),
            r".*attention/out/kernel": P("model"),
        }
    if parts > 1 and ff_width % parts == 0:
        split |= {
            r".*ff/up/kernel": P(None, "model"),
            r".*ff/up/bias": P("model"),
            r".*ff/down/kernel": P("model"),
        }
    if parts > 1 and num_experts % parts == 0:
        split[r".*ff/(up|down)_(kernel|bias)"] = P("model")
    return split
