"""Large recommender sequence models in JAX.

Names of array dims, used as suffixes in models, losses and metrics (`x_BSD`):

    B users or packed rows      S history length        T prediction positions
    V catalogue rows (row 0 is padding)                 K candidates, negatives or top-k
    D model width   N heads     H head width            F feed-forward width
    M micro-steps   L stacked layers    Q code levels       C codes of a level

Inside `shard_map` a lower-case letter is the local shard. Item id 0 is padding everywhere, masks are
bool with True for what is real, times are integer seconds UTC.
"""
