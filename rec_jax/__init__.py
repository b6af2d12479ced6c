"""Large recommender sequence models in JAX.

Array names end in the letters of their dims (`x_BSD`). Models, losses and metrics use these letters:

    B users or packed rows      S history length        T prediction positions
    V items of the catalogue (id 0 is padding)          K candidates, negatives or top-k
    D model width   N heads     H head width            F feed-forward width
    M micro-steps   L stacked layers    Q levels of a semantic id       C codes of a level

Inside `shard_map` a lower-case letter is the size of the local shard. Item id 0 is padding everywhere. Masks
are bool, True for real tokens. Times are integer seconds, UTC.
"""


def load(*workdirs, dims: int = 0):
    """Returns a `Recommender` for the model trained in a workdir, or for the ensemble of several.

        rec_jax.load("runs/mine").recommend(["i5", "i6"], k=10)

    See `rec_jax.serve.recommender.Recommender`; its `model` has the parameters, ids and titles.

    dims: score by the first `dims` dims of the vectors (a Matryoshka prefix, see loss.matryoshka); 0 = all.
    Raises ValueError if a workdir has no trained model.
    """
    from rec_jax.serve.recommender import Recommender

    return Recommender.load(*workdirs, dims=dims)
