"""Contrastive learning: two views of a history should be closer to each other than to other histories."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from rec_jax.data.batch import Batch
from rec_jax.hashing import mix
from rec_jax.nn.norm import unit
from rec_jax.objectives.augment import AugmentConfig

_MASKED = -1e30


@dataclass(frozen=True)
class ContrastiveConfig:
    """The contrastive loss. weight: the weight of a history's contrastive loss relative to the losses of its
    tokens; 0 = off.

    view: "dropout" encodes the history a second time with other dropout masks (one extra forward pass);
    "augment" encodes two augmented views of it, see the section `augment` here (two extra passes).
    same_target: histories with the same next item also count as positives. Negatives are the other histories
    of the micro-batch on the same device: train.micro_rows therefore changes the loss, and so does the number
    of devices if it leaves a device fewer rows. The matrix of all pairs has up to half the tokens of a
    micro-batch on each side: 0.5 GB for 32 rows of 200 tokens, 8 GB for 128 rows.
    """

    weight: float = 0.0
    temperature: float = 0.2  # cosines are divided by it
    view: Literal["dropout", "augment"] = "dropout"
    same_target: bool = False
    augment: AugmentConfig = AugmentConfig(crop=0.6, mask=0.3, reorder=0.6)

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"weight={self.weight} must be 0 (off) or more (ContrastiveConfig)")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive (ContrastiveConfig)")
        if self.view == "augment" and not self.augment.is_on:
            raise ValueError(
                "view='augment' needs crop, mask, reorder or substitute above 0 in the section augment, not "
                f"{self.augment} (ContrastiveConfig)"
            )

    @property
    def augments(self) -> bool:
        return self.weight > 0 and self.view == "augment"


def contrastive_sum(config: ContrastiveConfig, module, x_BSD, batch: Batch, key_B) -> jax.Array:
    """weight * the sum over histories of -log(exp(s+) / sum of exp(s)), an f32 scalar.

    s: cosine / temperature of the outputs at the last tokens of two views; only histories of at least two
    tokens take part. s+: the score of the two views of one history. The sum covers s+ and the views of all
    other histories. The loss of a history is the mean over its two views and, with same_target, over all
    positives. x_BSD: the module's output for the batch; it is the first view if view = "dropout". batch: as
    returned by `Objective.prepare`.

    Source: CL4SRec, Xie et al., ICDE'22 (arXiv 2010.14395), eq. 3; DuoRec, Qiu et al., WSDM'22 (arXiv
    2110.05730), eq. 9 to 14; several positives: Khosla et al., NeurIPS'20 (arXiv 2004.11362), eq. 2.
    Differs: cosines instead of dot products; views by dropout and by target are one loss.
    """
    row_N, column_N, real_N = _last_tokens(batch)
    if config.view == "dropout":
        pairs = [(x_BSD, batch.segments), (module(batch, mix(key_B, 1)), batch.segments)]
    else:
        pairs = [(module(view, mix(key_B, 1 + i)), view.segments) for i, view in enumerate(batch.views)]
    segment_N = batch.segments[row_N, column_N]
    last = [_of_segments(x, segments_BS, row_N, segment_N) for x, segments_BS in pairs]
    z_ND = unit(jnp.concatenate(last).astype(jnp.float32))

    history_N, real_N = jnp.tile(jnp.arange(len(row_N)), 2), jnp.tile(real_N, 2)
    is_positive_NN = history_N[:, None] == history_N
    if config.same_target:
        target_N = jnp.tile(batch.targets[row_N, column_N], 2)
        is_positive_NN |= target_N[:, None] == target_N
    is_other_NN = real_N & ~jnp.eye(len(z_ND), dtype=bool)
    scores_NN = jnp.where(is_other_NN, z_ND @ z_ND.T / config.temperature, _MASKED)
    is_positive_NN &= is_other_NN
    log_prob_NN = jnp.where(is_positive_NN, jax.nn.log_softmax(scores_NN), 0)
    loss_N = -jnp.sum(log_prob_NN, axis=1) / jnp.maximum(jnp.sum(is_positive_NN, axis=1), 1)
    return config.weight * jnp.sum(jnp.where(real_N, loss_N, 0)) / 2


def _last_tokens(batch):
    """Returns (rows, columns, is_real), each [N]: the last tokens of all segments of at least two tokens.
    N is half the number of tokens, the largest possible number of such segments."""
    segments_BS = batch.segments
    is_last_BS = segments_BS != jnp.pad(segments_BS[:, 1:], ((0, 0), (0, 1)))
    is_last_BS &= (segments_BS > 0) & (batch.positions > 0)
    row_N, column_N = jnp.nonzero(is_last_BS, size=max(1, segments_BS.size // 2), fill_value=0)
    return row_N, column_N, jnp.arange(len(row_N)) < jnp.sum(is_last_BS)


def _of_segments(x_BSD, segments_BS, row_N, segment_N):
    """x_ND: the vector at the last token of each segment."""
    is_inside_NS = segments_BS[row_N] == segment_N[:, None]
    column_N = jnp.max(jnp.where(is_inside_NS, jnp.arange(segments_BS.shape[1]), 0), axis=1)
    return x_BSD[row_N, column_N]
