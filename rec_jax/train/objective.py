"""What a step differentiates: the loss of one micro-batch."""

import jax.numpy as jnp

from rec_jax.hashing import row_keys
from rec_jax.models.base import Model, with_table
from rec_jax.nn.sharded import shard_index
from rec_jax.train.losses import LossConfig, draw_negatives, loss_sum, sharded_softmax_sum
from rec_jax.train.precision import PrecisionConfig
from rec_jax.tree import cast_floats


def make_objective(
    model: Model, loss_config: LossConfig, sampler, precision: PrecisionConfig, placement=None, extras=None
):
    """Returns objective(params, catalogue_vD, micro, context) -> (loss times context["scale"], tokens).

    params: as they are trained, their table with the rows that `micro` refers to. catalogue_vD: this device's
    rows of a table that a whole softmax reads, spread by `placement`; None for other losses. context: step,
    step_seed, shared negatives, scale, and the frozen arrays of `extras`: a `compress.training.Compression`.
    """

    def objective(params, catalogue_vD, micro, context):
        if extras:
            params = extras.adapt(params, context["frozen"], context["step"])
        module = model.bind(cast_floats(params, precision.compute_dtype))
        key_B = row_keys(context["step_seed"], micro["row_ids"])
        micro = module.training_batch(micro, key_B)
        if model.generates:
            loss, tokens = module.loss(micro, key_B)
            return loss * context["scale"], tokens
        hidden = []
        x_BSD = module(micro, key_B, hidden=hidden).astype(precision.output_dtype)
        if catalogue_vD is not None:
            catalogue_vD = cast_floats(catalogue_vD, precision.output_dtype)
            table_vD = model.bind(with_table(params, catalogue_vD)).item_vectors()
            rows_v = shard_index() * len(table_vD) + jnp.arange(len(table_vD))
            loss, tokens = sharded_softmax_sum(x_BSD, table_vD, placement.is_real(rows_v), micro)
            return loss * context["scale"], tokens
        if "negatives" in micro:
            negatives = micro["negatives"]
        else:
            length = micro["items"].shape[1]
            negatives = draw_negatives(loss_config, sampler, key_B, length, context["shared"])
        table_VD = model.bind(cast_floats(params, precision.output_dtype)).item_vectors()
        loss, tokens = loss_sum(loss_config, sampler, x_BSD, table_VD, micro, negatives)
        if extras and extras.distils:
            negatives = None if loss_config.type == "softmax" else negatives
            loss = extras.distil(loss, x_BSD, table_VD, hidden, micro, negatives, context["frozen"])
        return loss * context["scale"], tokens

    return objective
