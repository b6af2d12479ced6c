"""What a training step minimises: a token loss, what wraps it, and what adds to it.

token loss            softmax, sampled softmax, BCE or gBCE of the targets (token_loss.py)
Matryoshka            the mean of it over prefixes of the vectors
multi-token           it again for each head that looks further ahead
distillation          a mixture with the teachers' distribution (distill.py)
contrastive, experts  added: views of a history attract each other; experts are used evenly
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
    """Arrays that a step reads and never changes. They are arguments of the compiled step: a constant would
    be held once more.

    prior: of the items. neighbours_VK: see `augment`; None where nothing is substituted. frozen: of
    `compress.training.Compression`.
    """

    prior: ItemPrior
    neighbours_VK: jax.Array | None = None
    frozen: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepContext:
    """step: int32, steps done before. seed: uint32, of all that is random in the step. shared: negatives that
    all rows share, or None."""

    step: jax.Array
    seed: jax.Array
    fixed: Fixed
    shared: Negatives | None = None


_NO_CHANGE, _NO_VIEWS = AugmentConfig(), ContrastiveConfig()


class Objective:
    """The loss of a micro-batch inside a step, and what the step must draw and read for it.

    placement: of the rows of an item embedding table that the loss scores where they are, or None. extras: a
    `compress.training.Compression`, or None.
    """

    def __init__(
        self,
        model,
        loss: LossConfig,
        precision,
        *,
        augment: AugmentConfig = _NO_CHANGE,
        contrastive: ContrastiveConfig = _NO_VIEWS,
        placement=None,
        compression=None,
    ):
        self._model, self._loss, self._precision, self._compression = model, loss, precision, compression
        self._augment, self._contrastive, self._placement = augment, contrastive, placement
        self._token_loss = make_token_loss(loss)
        self._shares = is_sampled(loss) and loss.sharing == "batch"

    @property
    def abstract_params(self):
        """Of what is trained."""
        return (self._compression or self._model).abstract_params

    def trained(self, params):
        """What is trained, from the parameters of the model: these, or adapters."""
        return self._compression.init(params) if self._compression else params

    def final(self, params):
        """The parameters that the model is evaluated with, from those that are trained."""
        return self._compression.final(params) if self._compression else params

    def merged(self, params):
        """The same without what only quantization-aware training does to them: to be stored."""
        return self._compression.merged(params) if self._compression else params

    @property
    def reads_catalogue(self) -> bool:
        """Does it score all items, or only the targets and some negatives?"""
        return not is_sampled(self._loss)

    def draw_shared(self, batch: Batch, seed, fixed: Fixed) -> Negatives | None:
        """What all rows of all devices share. batch: the whole one, before augmentation."""
        return draw_shared(self._loss, fixed.prior.sampler, seed, batch.targets) if self._shares else None

    def prepare(self, batch: Batch, context: StepContext) -> Batch:
        """The rows of a device as training sees them: augmented, and with views for a contrastive loss."""
        neighbours_VK = context.fixed.neighbours_VK
        key_B, views, prepared = row_keys(context.seed, batch.row_ids), (), batch
        if self._augment.is_on:
            prepared = augment(self._augment, batch, mix(key_B, 1), neighbours_VK)
        if self._contrastive.augments:
            config = self._contrastive.augment
            views = tuple(augment(config, batch, mix(key_B, site), neighbours_VK) for site in (2, 3))
        return prepared.replace(views=views)

    def draw(self, batch: Batch, context: StepContext) -> Negatives | None:
        """Negatives of each row; None where there are none, or all rows share theirs."""
        if self.reads_catalogue or self._shares:
            return None
        key_B = row_keys(context.seed, batch.row_ids)
        return draw_by_row(self._loss, context.fixed.prior.sampler, key_B, batch.segments.shape[1])

    def __call__(self, params, scored, micro: Batch, negatives: Negatives | None, context: StepContext):
        """(loss, tokens) of a micro-batch: the sum over its tokens with a target, and their number.

        params: as they are trained; of a table that is updated sparsely, the entries that were read. scored:
        the same for the item vectors, where the loss scores a row-sharded table: with this device's rows of
        it; else None. negatives: of the rows, None = shared, or still to be drawn.
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
        """The token loss of query vectors, with what wraps it."""
        config, x_BSD = self._loss, x_BSD.astype(self._precision.output_dtype)
        module = self._model.bind(cast_floats(params, self._precision.output_dtype))
        catalogue = Catalogue(module.item_vectors(), self._placement)

        def token_loss(x_BSD, catalogue, batch):
            return self._token_loss(x_BSD, catalogue, batch, negatives, context.fixed.prior)

        def over_prefixes(x_BSD, batch):
            """Source: Kusupati et al., NeurIPS'22 (arXiv 2205.13147), eq. 1, with equal weights. Differs:
            their mean, so that a step stays as large."""
            loss = token_loss(x_BSD, catalogue, batch)
            for dims in config.matryoshka:
                prefixes = dataclasses.replace(catalogue, vectors=module.cut_items(catalogue.vectors, dims))
                loss += token_loss(module.cut_queries(x_BSD, dims), prefixes, batch)
            return loss / (1 + len(config.matryoshka)) if config.matryoshka else loss

        # Multi-token prediction. Source: Gloeckle et al., ICML'24 (arXiv 2404.19737), eq. 2. Differs: a head
        # adds a matrix product to the query vectors of the first, and is no layer.
        loss = over_prefixes(x_BSD, micro)
        for steps in range(1, module.config.num_future):
            later = over_prefixes(module.ahead(x_BSD, steps), micro.shift_targets(steps))
            loss += config.future_weight * later
        if self._compression and self._compression.distils:
            student = x_BSD, catalogue.vectors, hidden
            loss = self._compression.distil(loss, student, micro, negatives, context.fixed.frozen)
        return loss
