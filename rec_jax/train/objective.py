"""What a step differentiates: the loss of one micro-batch."""

from functools import partial

import jax.numpy as jnp

from rec_jax.hashing import row_keys
from rec_jax.models.base import Model, with_table
from rec_jax.train.contrastive import contrastive_sum
from rec_jax.train.heads import sum_over_heads
from rec_jax.train.losses import LossConfig, draw_negatives, loss_sum, sharded_softmax_sum
from rec_jax.train.precision import PrecisionConfig
from rec_jax.tree import cast_floats


def make_objective(
    model: Model,
    loss_config: LossConfig,
    sampler,
    precision: PrecisionConfig,
    placement=None,
    extras=None,
    contrastive=None,
):
    """Returns objective(params, catalogue_vD, micro, context) -> (loss, tokens).

    params: as they are trained, their table with the rows that `micro` refers to. catalogue_vD: this device's
    rows of a table that a whole softmax reads, spread by `placement`; None for other losses. context: step,
    step_seed, shared negatives, and the frozen arrays of `extras`: a `compress.training.Compression`.
    contrastive: a `ContrastiveConfig` whose weight is above 0, or None.
    """

    def objective(params, catalogue_vD, micro, context):
        if extras:
            params = extras.adapt(params, context["frozen"], context["step"])
        module = model.bind(cast_floats(params, precision.compute_dtype))
        key_B = row_keys(context["step_seed"], micro.row_ids)
        micro = module.training_batch(micro, key_B)
        if model.generates:
            loss, tokens = module.loss(micro, key_B)
            return loss, tokens
        hidden, penalties = [], []
        x_BSD = module(micro, key_B, hidden=hidden, penalties=penalties).astype(precision.output_dtype)
        penalty = sum(map(jnp.sum, penalties))
        if catalogue_vD is not None:
            catalogue_vD = cast_floats(catalogue_vD, precision.output_dtype)
            table_vD = model.bind(with_table(params, catalogue_vD)).item_vectors()
            spread = partial(sharded_softmax_sum, loss_config, sampler, placement)
            loss, tokens = sum_over_heads(loss_config, module, spread, x_BSD, table_vD, micro)
            if contrastive:
                loss += contrastive_sum(contrastive, module, x_BSD, micro, key_B)
            return loss + penalty, tokens
        negatives = context["shared"]
        if "negatives" in micro.places.get("items", {}):
            negatives = micro.places["items"]["negatives"]
        elif loss_config.type != "softmax" and loss_config.sharing != "batch":
            length = micro.segments.shape[1]
            negatives = draw_negatives(loss_config, sampler, key_B, length, context["shared"])
        table_VD = model.bind(cast_floats(params, precision.output_dtype)).item_vectors()
        whole = partial(loss_sum, loss_config, sampler, negatives=negatives)
        loss, tokens = sum_over_heads(loss_config, module, whole, x_BSD, table_VD, micro)
        if extras and extras.distils:
            negatives = None if loss_config.type == "softmax" else negatives
            loss = extras.distil(loss, x_BSD, table_VD, hidden, micro, negatives, context["frozen"])
        if contrastive:
            loss += contrastive_sum(contrastive, module, x_BSD, micro, key_B)
        return loss + penalty, tokens

    return objective
