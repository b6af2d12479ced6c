"""The sequence models that a config can name by `model.type`."""

import functools
import operator

from rec_jax.models.bert4rec import BERT4Rec, BERT4RecConfig
from rec_jax.models.esasrec import ESASRec, ESASRecConfig
from rec_jax.models.gru4rec import GRU4Rec, GRU4RecConfig
from rec_jax.models.hstu import HSTU, HSTUConfig
from rec_jax.models.lru import LRUConfig, LRURec
from rec_jax.models.sasrec import SASRec, SASRecConfig

MODELS = {
    SASRecConfig: SASRec,
    BERT4RecConfig: BERT4Rec,
    ESASRecConfig: ESASRec,
    GRU4RecConfig: GRU4Rec,
    HSTUConfig: HSTU,
    LRUConfig: LRURec,
}
ModelConfig = functools.reduce(operator.or_, MODELS)


def model_builder(config: ModelConfig, num_items: int, max_len: int):
    """rngs -> the module."""
    build_module = MODELS[type(config)]
    return lambda rngs: build_module(config, num_items, max_len, rngs=rngs)
