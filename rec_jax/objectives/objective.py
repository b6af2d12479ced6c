"""The objective that a training step minimises: a token loss, its wrappers, and additional terms.

token loss            softmax, sampled softmax, BCE or gBCE of the targets (token_loss.py)
Matryoshka            the mean of the token loss over prefixes of the vectors
multi-token           the token loss again for each head that predicts a later item
distillation          a mixture with the loss against the teachers' distribution (distill.py)
contrastive           added: two views of a history should have similar vectors (contrastive.py)
experts               added: a penalty if experts are used unevenly
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from rec_jax.data.batch import Batch
from rec_jax.hashing import mix, row_keys
from rec_jax.objectives.augment import AugmentConfig, augment
from rec_jax.objectives.catalogue import Catalogue
from rec_jax.objectives.contrastive import ContrastiveConfig, contrastive_sum
from rec_jax.objectives.negatives import ItemPrior, Negatives, draw_by_row, draw_shared
from rec_jax.objectives.token_loss import LossConfig, is_sampled, make_token_loss
from rec_jax.tree import cast_floats


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fixed:
    """Arrays that a step reads and never changes. They are arguments of the compiled step, because constants
    of the program would take memory a second time.

    prior: the item prior of the loss. neighbours_VK: see `augment`; None if no items are substituted. frozen:
    the frozen arrays of `compress.training.Compression`.
    """

    prior: ItemPrior
    neighbours_VK: jax.Array | None = None
    frozen: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepContext:
    """Inputs of a step other than parameters and batch. step: int32, the number of steps before this one.
    seed: uint32, determines all randomness of the step. shared: negatives that all rows share, or None."""

    step: jax.Array
    seed: jax.Array
    fixed: Fixed
    shared: Negatives | None = None


_NO_AUGMENT, _NO_CONTRASTIVE = AugmentConfig(), ContrastiveConfig()


class Objective:
    """The loss of a micro-batch inside a step, and the random draws that it needs.

    placement: the placement of a row-sharded item embedding table over whose shards the loss is computed, or
    None. compression: a `compress.training.Compression`, or None.
    """

    def __init__(
        self,
        model,
        loss: LossConfig,
        precision,
        *,
        augment: AugmentConfig = _NO_AUGMENT,
        contrastive: ContrastiveConfig = _NO_CONTRASTIVE,
        placement=None,
        compression=None,
    ):
        self._model, self._loss, self._precision, self._compression = model, loss, precision, compression
        self._augment, self._contrastive, self._placement = augment, contrastive, placement
        self._token_loss = make_token_loss(loss)
        self._shares = is_sampled(loss) and loss.sharing == "batch"

    @property
    def abstract_params(self):
        """Shapes and dtypes of the trained parameters."""
        return (self._compression or self._model).abstract_params

    def trained(self, params):
        """Returns the parameters to train, made from those of the model: the same ones, or LoRA adapters."""
        return self._compression.init(params) if self._compression else params

    def final(self, params):
        """Returns the model parameters for evaluation, made from the trained ones."""
        return self._compression.final(params) if self._compression else params

    def merged(self, params):
        """Returns the model parameters to store: as `final`, but without the rounding of quantization-aware
        training."""
        return self._compression.merged(params) if self._compression else params

    @property
    def reads_catalogue(self) -> bool:
        """Whether the loss scores all items, rather than only the targets and sampled negatives."""
        return not is_sampled(self._loss)

    def draw_shared(self, batch: Batch, seed, fixed: Fixed) -> Negatives | None:
        """Draws the negatives that all rows of all devices share; None if the loss has none. batch: the batch
        of all devices, before augmentation."""
        return draw_shared(self._loss, fixed.prior.sampler, seed, batch.targets) if self._shares else None

    def prepare(self, batch: Batch, context: StepContext) -> Batch:
        """Returns the rows of a device augmented for training, and with two views for a contrastive loss."""
        neighbours_VK = context.fixed.neighbours_VK
        key_B, views, prepared = row_keys(context.seed, batch.row_ids), (), batch
        if self._augment.is_on:
            prepared = augment(self._augment, batch, mix(key_B, 1), neighbours_VK)
        if self._contrastive.augments:
            config = self._contrastive.augment
            views = tuple(augment(config, batch, mix(key_B, site), neighbours_VK) for site in (2, 3))
        return prepared.replace(views=views)

    def draw(self, batch: Batch, context: StepContext) -> Negatives | None:
        """Draws the negatives of each row; None if the loss has none, or if all rows share them."""
        if self.reads_catalogue or self._shares:
            return None
        key_B = row_keys(context.seed, batch.row_ids)
        return draw_by_row(self._loss, context.fixed.prior.sampler, key_B, batch.segments.shape[1])

    def __call__(self, params, scored, micro: Batch, negatives: Negatives | None, context: StepContext):
        """Returns (loss, tokens) of a micro-batch: the sum over tokens with a target, and their number.

        params: the trained parameters; for a table with sparse updates, only the entries that were read.
        scored: if the loss scores a row-sharded table, the same parameters with this device's shard of the
        table, from which the item vectors are computed; else None. negatives: the negatives of the rows; None
        = they are shared, or still to be drawn.
        """
        if self._compression:
            params = self._compression.adapt(params, context.fixed.frozen, context.step)
        module = self._model.bind(cast_floats(params, self._precision.compute_dtype))
        key_B = row_keys(context.seed, micro.row_ids)
        micro = module.training_batch(micro, key_B)
        if negatives is None:
            negatives = context.shared if self._shares else self.draw(micro, context)

        def score(x_BSD, hidden):
            return self.score(params if scored is None else scored, x_BSD, hidden, micro, negatives, context)

        loss, x_BSD, penalty = module.loss(micro, key_B, score)
        if self._contrastive.weight:
            x_BSD = x_BSD.astype(self._precision.output_dtype)
            loss += contrastive_sum(self._contrastive, module, x_BSD, micro, key_B)
        return loss + penalty, jnp.sum(micro.targets > 0, dtype=jnp.float32)

    def score(self, params, x_BSD, hidden, micro, negatives, context):
        """Returns the token loss of query vectors, including Matryoshka, multi-token and distillation."""
        config, x_BSD = self._loss, x_BSD.astype(self._precision.output_dtype)
        module = self._model.bind(cast_floats(params, self._precision.output_dtype))
        catalogue = Catalogue(module.item_vectors(), self._placement)

        def token_loss(x_BSD, catalogue, batch):
            return self._token_loss(x_BSD, catalogue, batch, negatives, context.fixed.prior)

        def over_prefixes(x_BSD, batch):
            """The mean token loss over Matryoshka prefixes.

            Source: Kusupati et al., NeurIPS'22 (arXiv 2205.13147), eq. 1, with equal weights. Differs: the
            mean instead of the sum, so that the loss keeps its scale.
            """
            loss = token_loss(x_BSD, catalogue, batch)
            for dims in config.matryoshka:
                prefixes = dataclasses.replace(catalogue, vectors=module.cut_items(catalogue.vectors, dims))
                loss += token_loss(module.cut_queries(x_BSD, dims), prefixes, batch)
            return loss / (1 + len(config.matryoshka)) if config.matryoshka else loss

        # Multi-token prediction. Source: Gloeckle et al., ICML'24 (arXiv 2404.19737), eq. 2. Differs: a head
        # is not a layer; it adds a linear map of the first head's query vectors to these vectors.
        loss = over_prefixes(x_BSD, micro)
        for steps in range(1, module.config.num_future):
            later = over_prefixes(module.ahead(x_BSD, steps), micro.shift_targets(steps))
            loss += config.future_weight * later
        if self._compression and self._compression.distils:
            student = x_BSD, catalogue.vectors, hidden
            loss = self._compression.distil(loss, student, micro, negatives, context.fixed.frozen)
        return loss
