"""One loss for several views of the same vectors: their first dims, and the heads that look further ahead."""

from rec_jax.models.base import SequenceConfig
from rec_jax.models.registry import MODELS
from rec_jax.train.losses import LossConfig


def sum_over_heads(config: LossConfig, module, loss_of, x_BSD, table_VD, batch) -> tuple:
    """The loss of the next item, and future_weight times that of each later one which has a head.

    loss_of(x_BSD, table_VD, batch) -> (sum, count); the count is that of the next item.
    Source: Gloeckle et al., ICML'24 (arXiv 2404.19737), eq. 2. Differs: a head adds a
    matrix product to the query vectors of the first, and is no layer.
    """
    loss, count = _mean_over_dims(config, module, loss_of, x_BSD, table_VD, batch)
    for steps in range(1, module.config.num_future):
        later, x_later_BSD = batch.shift_targets(steps), module.ahead(x_BSD, steps)
        more, _ = _mean_over_dims(config, module, loss_of, x_later_BSD, table_VD, later)
        loss += config.future_weight * more
    return loss, count


def _mean_over_dims(config: LossConfig, module, loss_of, x_BSD, table_VD, batch) -> tuple:
    """Source: Kusupati et al., NeurIPS'22 (arXiv 2205.13147), eq. 1, with equal weights. Differs: their mean,
    so that a step stays as large."""
    loss, count = loss_of(x_BSD, table_VD, batch)
    if not config.matryoshka:
        return loss, count
    for dims in config.matryoshka:
        loss += loss_of(module.cut_queries(x_BSD, dims), module.cut_items(table_VD, dims), batch)[0]
    return loss / (1 + len(config.matryoshka)), count


def check(config: LossConfig, model: SequenceConfig, max_len: int, teachers: tuple = ()) -> None:
    """Raises ValueError for configs that do not go together."""
    if config.matryoshka and config.matryoshka[-1] >= model.table_dim:
        raise ValueError(
            f"loss.matryoshka={config.matryoshka} must be below the {model.table_dim} dims of the vectors, "
            "which are always there (LossConfig)"
        )
    name = type(model).__name__
    if model.num_future > 1 and not MODELS[type(model)].is_causal:
        raise ValueError(
            f"model.num_future={model.num_future}: type={model.type!r} predicts masked items, of which none "
            f"is further ahead; set num_future=1, or use a causal model ({name})"
        )
    if model.num_future > max_len:
        raise ValueError(
            f"model.num_future={model.num_future} must be at most data.max_len={max_len}, for there is "
            f"nothing further ahead ({name})"
        )
    asked = {
        "loss.matryoshka": config.matryoshka,
        "loss.ips_power": config.ips_power,
        "loss.popularity_discount": config.popularity_discount,
        "model.num_future": model.num_future - 1,
    }
    for key, is_on in asked.items():
        if is_on and teachers:
            raise ValueError(
                f"{key} does not go with compress.distill.teachers, whose loss knows nothing of it: set it "
                "to its default (DistillConfig)"
            )
