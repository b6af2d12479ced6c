"""The sequence models that `model.type` of a config can name."""

import functools
import inspect
import operator

import flax.nnx as nnx

from rec_jax.data.schema import Schema
from rec_jax.models.bert4rec import BERT4Rec, BERT4RecConfig
from rec_jax.models.esasrec import ESASRec, ESASRecConfig
from rec_jax.models.gru4rec import GRU4Rec, GRU4RecConfig
from rec_jax.models.hstu import HSTU, HSTUConfig
from rec_jax.models.lru import LRUConfig, LRURec
from rec_jax.models.sasrec import SASRec, SASRecConfig
from rec_jax.models.semantic_ids import SemanticIds, SemanticIdsConfig, numbered_semantic_ids
from rec_jax.models.tiger import Tiger, TigerConfig
from rec_jax.nn.dims import named

MODELS = {
    SASRecConfig: SASRec,
    BERT4RecConfig: BERT4Rec,
    ESASRecConfig: ESASRec,
    GRU4RecConfig: GRU4Rec,
    HSTUConfig: HSTU,
    LRUConfig: LRURec,
    TigerConfig: Tiger,
}
ModelConfig = functools.reduce(operator.or_, MODELS)


def model_builder(
    config: ModelConfig,
    num_items: int,
    max_len: int,
    semantic_ids: SemanticIds | None = None,
    schema: Schema = (),
):
    """Returns a function rngs -> module.

    semantic_ids: for generative retrieval models; None = `numbered_semantic_ids`. schema: the features of the
    log, for models whose constructor has an argument of this name.
    """
    build_module = MODELS[type(config)]
    extra = {}
    if build_module.is_generative:
        extra["semantic_ids"] = semantic_ids or numbered_semantic_ids(num_items, SemanticIdsConfig())
    if "schema" in inspect.signature(build_module.__init__).parameters:
        extra["schema"] = schema

    def build(rngs):
        module = build_module(config, num_items, max_len, rngs=rngs, **extra)
        if config.num_future > 1:  # made last, so that other parameters start the same with and without them
            heads = [_future_head(config, rngs) for _ in range(1, config.num_future)]
            module.future = nnx.List(heads)
        return module

    return build


def _future_head(config, rngs: nnx.Rngs) -> nnx.Linear:
    """Returns one head of multi-token prediction. Its kernel starts at zero, so that it predicts what the
    first head does."""
    dim, name = config.table_dim, config.table_dim_name
    zeros = nnx.initializers.zeros
    return named(nnx.Linear(dim, dim, use_bias=False, kernel_init=zeros, rngs=rngs), name, name)
