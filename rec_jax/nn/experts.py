"""Mixture of experts: feed-forward layers, of which each token uses a few."""

import math
from dataclasses import dataclass

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from rec_jax.nn.context import Context
from rec_jax.nn.dense import dense, dense_each
from rec_jax.nn.dims import named
from rec_jax.nn.parallel import sum_parts, to_parts


@jax.custom_vjp
def move(x_AD, source_N, target_A):
    """Returns x_AD[source_N], with zeros where the source is A. target_A: the inverse, the index in the
    result of each vector of x, or N if it is not moved.

    With the inverse, the gradient is a gather too. On a CPU that is faster than a scatter, and both are much
    faster than products with one-hot matrices.
    """
    return x_AD.at[source_N].get(mode="fill", fill_value=0)


move.defvjp(
    lambda x_AD, source_N, target_A: (move(x_AD, source_N, target_A), (source_N, target_A)),
    lambda moves, grad_ND: (move(grad_ND, moves[1], moves[0]), None, None),
)


@dataclass(frozen=True)
class Mixture:
    """num_experts: the router chooses experts_per_token of them. capacity_factor: the most tokens of a row
    that an expert takes in training, as a multiple of an even share. balance_weight: the weight of the
    penalty for an uneven load."""

    num_experts: int
    experts_per_token: int
    capacity_factor: float
    balance_weight: float


class Experts(nnx.Module):
    """E feed-forward layers and a router that chooses K of them for each token, with a gate for each choice.

    In training, an expert takes at most capacity_factor * K * S / E tokens of a packed row, the first ones
    that chose it; its output for the others is 0. Outside of training there is no limit: every expert then
    computes every token, which takes E / K times the multiply-adds.

    The experts are split over the mesh axis "model"; each device has all tokens.

    Source: Shazeer et al., ICLR'17 (arXiv 1701.06538), section 2; Lepikhin et al., arXiv 2006.16668, section
    2.2, for capacities; Fedus et al., JMLR'22 (arXiv 2101.03961), equations 2 and 4 to 6, for the balance and
    for the gate if K = 1, which is the router's probability (if K > 1, the gates of a token sum to 1).
    Differs: capacity and balance are counted in each packed row, so that neither depends on the rest of a
    batch. Slots are given to tokens in order, so no token depends on a later one; but in training the earlier
    segments of a row may take slots that later ones need. The router has no noise, and all K choices are
    deterministic.
    """

    def __init__(
        self,
        width: int,
        ff_width: int,
        activation: str,
        mixture: Mixture,
        *,
        is_gated: bool = False,
        rngs: nnx.Rngs,
    ):
        """is_gated: an expert computes (activation(x W) * (x V)) W_2, otherwise activation(x W) W_2."""
        num, up_width = mixture.num_experts, (2 if is_gated else 1) * ff_width
        init = nnx.initializers.xavier_uniform(batch_axis=0)
        # Near 0, so that all experts start with about the same number of tokens.
        router = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (width, num)))
        self.router_kernel = named(router, "width", None)  # replicated where the experts are split
        hidden = (2 if is_gated else 1, "expert_width")
        up = nnx.Param(init(rngs.params(), (num, width, up_width)))
        self.up_kernel = named(up, "experts", "width", hidden)
        self.up_bias = named(nnx.Param(jnp.zeros((num, up_width))), "experts", hidden)
        down = nnx.Param(init(rngs.params(), (num, ff_width, width)))
        self.down_kernel = named(down, "experts", "expert_width", "width")
        self.down_bias = named(nnx.Param(jnp.zeros((num, width))), "experts", "width")
        self.mixture, self.activation, self.is_gated = mixture, activation, is_gated

    def __call__(self, x, ctx: Context):
        """Returns (y like x [..., D], penalty f32[B]). Outside of training the penalty is None."""
        if ctx.is_training:
            return self.in_training(x, ctx.segments > 0)
        x_TD = x.reshape(-1, x.shape[-1])
        _, chosen_TKE, gates_TK = self.route(x_TD)
        gates_TE = jnp.sum(jnp.where(chosen_TKE, gates_TK[..., None], 0), axis=1).astype(x.dtype)
        x_ETD = jnp.broadcast_to(x_TD, (gates_TE.shape[1], *x_TD.shape))
        y_ETD = self.outputs(x_ETD) * gates_TE.T[..., None]
        return jnp.sum(y_ETD, axis=0).reshape(x.shape), None

    def outputs(self, x_ETD):
        """Returns y_ETD: the output of each expert for its own tokens."""
        hidden_ETF = dense_each(x_ETD, self.up_kernel[...]) + self.up_bias[...][:, None]
        return dense_each(self.activate(hidden_ETF), self.down_kernel[...]) + self.down_bias[...][:, None]

    def in_training(self, x_BSD, real_BS):
        """Returns (y_BSD, penalty f32[B]). real_BS: bool, False for padding, whose output is 0 and which
        takes no slot."""
        config, (batch, length, width) = self.mixture, x_BSD.shape
        num, num_chosen = config.num_experts, config.experts_per_token
        probs_TE, chosen_TKE, gates_TK = self.route(x_BSD.reshape(-1, width))
        chosen_BSKE = chosen_TKE.reshape(batch, length, num_chosen, num) & real_BS[..., None, None]
        chosen_BSE = jnp.any(chosen_BSKE, axis=2)
        probs_BSE = probs_TE.reshape(batch, length, num)
        penalty_B = config.balance_weight * balance(probs_BSE, chosen_BSE, real_BS)

        num_local = self.up_bias.shape[0]
        is_split = num_local < num  # over mesh axis "model"
        first = jax.lax.axis_index("model") * num_local if is_split else 0
        capacity = min(length, math.ceil(config.capacity_factor * num_chosen * length / num))
        before_BSE = jnp.cumsum(chosen_BSE, axis=1, dtype=jnp.int32) - chosen_BSE
        expert_BSE = jnp.arange(num) - first
        taken_BSE = (before_BSE < capacity) & (expert_BSE >= 0) & (expert_BSE < num_local)
        # Slots of this device's experts: [e, B, capacity], flattened; num_slots = no slot.
        slot_BSE = (expert_BSE * batch + jnp.arange(batch)[:, None, None]) * capacity + before_BSE
        num_slots, num_moves = num_local * batch * capacity, gates_TK.size
        moved_BSKE = chosen_BSKE & taken_BSE[:, :, None]
        slot_A = jnp.min(jnp.where(moved_BSKE, slot_BSE[:, :, None], num_slots), axis=-1).reshape(-1)
        move_N = jnp.full(num_slots, num_moves).at[slot_A].set(jnp.arange(num_moves), mode="drop")

        if is_split:
            x_BSD, gates_TK = to_parts(x_BSD), to_parts(gates_TK)
        x_AD = jnp.repeat(x_BSD.reshape(-1, width), num_chosen, axis=0)
        x_eND = move(x_AD, move_N, slot_A).reshape(num_local, batch * capacity, width)
        y_AD = move(self.outputs(x_eND).reshape(num_slots, width), slot_A, move_N)
        y_TD = jnp.sum(y_AD.reshape(-1, num_chosen, width) * gates_TK[..., None].astype(y_AD.dtype), axis=1)
        return (sum_parts(y_TD) if is_split else y_TD).reshape(x_BSD.shape), penalty_B

    def route(self, x_TD):
        """Returns (probs_TE f32, chosen_TKE bool: whether choice k is expert e, gates_TK f32)."""
        num_chosen = self.mixture.experts_per_token
        logits_TE = dense(x_TD.astype(jnp.float32), self.router_kernel[...])
        probs_TE = jax.nn.softmax(logits_TE)
        expert_TK = jax.lax.top_k(jax.lax.stop_gradient(probs_TE), num_chosen)[1]
        chosen_TKE = expert_TK[..., None] == jnp.arange(probs_TE.shape[1])
        gates_TK = jnp.sum(jnp.where(chosen_TKE, probs_TE[:, None], 0), axis=-1)
        if num_chosen > 1:  # if K = 1, the gate would always be 1 and the router would get no gradient
            gates_TK /= jnp.sum(gates_TK, axis=-1, keepdims=True)
        return probs_TE, chosen_TKE, gates_TK

    def activate(self, hidden):
        function = getattr(nnx, self.activation)
        if not self.is_gated:
            return function(hidden)
        gate, up = jnp.split(hidden, 2, axis=-1)
        return function(gate) * up


def balance(probs_BSE, chosen_BSE, real_BS):
    """f32[B]: E * sum over experts of (share of the row's choices) * (mean probability in the row), times the
    number of real tokens of the row. Per token it is 1 if the load is even, and E if one expert gets all."""
    num = probs_BSE.shape[-1]
    choices_BE = jnp.sum(chosen_BSE, axis=1, dtype=jnp.float32)
    probs_BE = jnp.sum(jnp.where(real_BS[..., None], probs_BSE, 0), axis=1)
    return num * jnp.sum(choices_BE * probs_BE, axis=-1) / jnp.maximum(jnp.sum(choices_BE, axis=-1), 1)
