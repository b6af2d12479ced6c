"""Large recommender sequence models in JAX.

Names of array dims, used as suffixes in models, losses and metrics (`x_BSD`):

    B users or packed rows      S history length        T prediction positions
    V catalogue rows (row 0 is padding)                 K candidates, negatives or top-k
    D model width   N heads     H head width            F feed-forward width
    M micro-steps   L stacked layers    Q code levels       C codes of a level

Inside `shard_map` a lower-case letter is the local shard. Item id 0 is padding everywhere, masks are
bool with True for what is real, times are integer seconds UTC.
"""


def load(*workdirs, dims: int = 0):
    """A recommender by the model that was trained in a workdir, or by the mean of several.

        rec_jax.load("runs/mine").recommend(["i5", "i6"], k=10)

    See `rec_jax.serve.recommender.Recommender`, whose `model` has parameters, ids and titles. dims: score by
    so many first dims (loss.matryoshka); 0 = by all. Raises ValueError if there is no trained model.
    """
    from rec_jax.serve.recommender import Recommender

    return Recommender.load(*workdirs, dims=dims)
