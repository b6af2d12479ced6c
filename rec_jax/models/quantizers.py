"""Quantizers, which turn each vector into a few codes: residual k-means and a residual-quantised
autoencoder."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

_CHUNK = 8_192  # vectors that are compared with all centres at once
_BATCH = 1_024
_COMMITMENT = 0.25
_SETTLE = 0.3  # share of the epochs, at the end, in which unused codes are not moved


def kmeans(
    x_NF: np.ndarray, codebook_size: int, rng: np.random.Generator, iterations: int = 20
) -> np.ndarray:
    """Returns the centres f32[codebook_size, F] that Lloyd's algorithm finds from a k-means++ initialisation.
    A centre that loses all its vectors moves to the vector that is farthest from its nearest centre.

    Source: Arthur & Vassilvitskii, SODA'07, for the initialisation."""
    centres = np.empty((codebook_size, x_NF.shape[1]), np.float32)
    squares_N = np.sum(x_NF**2, axis=1)
    distance_N = np.full(len(x_NF), np.inf, np.float32)
    chosen = rng.integers(len(x_NF))
    for code in range(codebook_size):
        centres[code] = x_NF[chosen]
        fresh_N = squares_N + squares_N[chosen] - 2 * x_NF @ x_NF[chosen]
        distance_N = np.minimum(distance_N, np.maximum(fresh_N, 0))
        cdf_N = np.cumsum(distance_N, dtype=np.float64)
        chosen = min(np.searchsorted(cdf_N, rng.random() * cdf_N[-1], side="right"), len(x_NF) - 1)
    for _ in range(iterations):
        codes_N, distance_N = _nearest(x_NF, centres)
        order = np.argsort(codes_N, kind="stable")
        used, starts, counts = np.unique(codes_N[order], return_index=True, return_counts=True)
        centres[used] = np.add.reduceat(x_NF[order], starts) / counts[:, None]
        lost = np.setdiff1d(np.arange(codebook_size), used)
        far = np.argsort(-distance_N, kind="stable")[: len(lost)]  # fewer, if there are fewer vectors
        centres[lost[: len(far)]] = x_NF[far]
    return centres


def _nearest(x_NF, centres_CF) -> tuple[np.ndarray, np.ndarray]:
    """Returns (codes int[N], distances f32[N]): the nearest centre of each vector, and its squared
    distance."""
    codes, distances = [], []
    for first in range(0, len(x_NF), _CHUNK):
        x = x_NF[first : first + _CHUNK]
        squares = np.sum(x**2, 1)[:, None] + np.sum(centres_CF**2, 1) - 2 * x @ centres_CF.T
        codes.append(np.argmin(squares, axis=1))
        distances.append(np.min(squares, axis=1))
    return np.concatenate(codes), np.concatenate(distances)


def residual_kmeans(x_NF: np.ndarray, num_levels: int, codebook_size: int, seed: int) -> tuple:
    """Returns (codes int32[N, Q], centres f32[Q, C, F]). Each level is a k-means of the residuals of the
    levels before it."""
    rng, residual_NF = np.random.default_rng(seed), x_NF.copy()
    codes, centres = [], []
    for _ in range(num_levels):
        centres.append(kmeans(residual_NF, codebook_size, rng))
        codes.append(_nearest(residual_NF, centres[-1])[0])
        residual_NF = residual_NF - centres[-1][codes[-1]]
    return np.stack(codes, axis=1).astype(np.int32), np.stack(centres)


def rqvae(
    x_NF: np.ndarray, num_levels: int, codebook_size: int, seed: int, *, epochs: int, width: int, latent: int
) -> np.ndarray:
    """Returns codes int32[N, Q]: the quantised latents of an autoencoder that is trained to reconstruct
    vectors from their codes.

    width: hidden units of the encoder and of the decoder. latent: the number of dims that are quantised.
    Source: Lee et al., CVPR'22 (arXiv 2203.01941) and TIGER, arXiv 2305.05065, section 3.1.
    Differs: one hidden layer; after each epoch except the last ones (`_SETTLE`), codes that no item uses move
    to the residuals of random items.
    """
    num, dims = x_NF.shape
    rng = np.random.default_rng(seed)
    params = {
        name: {"kernel": _glorot(rng, a, b), "bias": np.zeros(b, np.float32)}
        for name, a, b in (
            ("encode", dims, width), ("to_latent", width, latent), ("from_latent", latent, width),
            ("decode", width, dims),
        )
    }  # fmt: skip
    x_NF = jnp.asarray(x_NF)
    latents = np.asarray(jax.jit(_encode)(params, x_NF))
    params["codebooks"] = residual_kmeans(latents, num_levels, codebook_size, seed)[1]
    params = jax.tree.map(jnp.asarray, params)
    optimizer = optax.adam(1e-3)
    opt_state = optimizer.init(params)
    size = min(_BATCH, num)

    @jax.jit
    def epoch(params, opt_state, order_MB):
        def step(carry, ids_B):
            params, opt_state = carry
            grads = jax.grad(_loss)(params, x_NF[ids_B])
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, opt_state), order_MB)[0]

    quantise = jax.jit(lambda params: _quantise(_encode(params, x_NF), params["codebooks"]))
    for index in range(epochs):
        order = rng.permutation(num)[: num // size * size].reshape(-1, size)
        params, opt_state = epoch(params, opt_state, order)
        if index < (1 - _SETTLE) * epochs:
            codes_NQ, residuals = quantise(params)
            params["codebooks"] = _revive(params["codebooks"], np.asarray(codes_NQ), residuals, rng)
    return np.asarray(quantise(params)[0], np.int32)


def _glorot(rng, a: int, b: int) -> np.ndarray:
    return rng.uniform(-1, 1, (a, b)).astype(np.float32) * (6 / (a + b)) ** 0.5


def _dense(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def _encode(params, x_BF):
    return _dense(params["to_latent"], jax.nn.relu(_dense(params["encode"], x_BF)))


def _quantise(z_BE, codebooks_QCE):
    """Returns (codes [B, Q], residuals [Q][B, E]): of each level, the codes and the residuals before it."""
    codes, residuals, residual_BE = [], [], z_BE
    for centres_CE in codebooks_QCE:
        squares_BC = jnp.sum(centres_CE**2, 1) - 2 * residual_BE @ centres_CE.T
        codes.append(jnp.argmin(squares_BC, axis=1))
        residuals.append(residual_BE)
        residual_BE = residual_BE - jax.lax.stop_gradient(centres_CE[codes[-1]])
    return jnp.stack(codes, axis=1), residuals


def _loss(params, x_BF):
    """The reconstruction error plus, at each level, the codebook loss (moves codes towards residuals) and the
    commitment loss (moves residuals towards codes)."""
    z_BE = _encode(params, x_BF)
    codes_BQ, residuals = _quantise(z_BE, params["codebooks"])
    chosen = [centres[codes_B] for centres, codes_B in zip(params["codebooks"], codes_BQ.T, strict=True)]
    stop = jax.lax.stop_gradient
    loss = sum(
        jnp.sum((stop(residual) - code) ** 2) + _COMMITMENT * jnp.sum((residual - stop(code)) ** 2)
        for residual, code in zip(residuals, chosen, strict=True)
    )
    quantised_BE = z_BE + stop(sum(chosen) - z_BE)  # straight-through estimator
    decoded_BF = _dense(params["decode"], jax.nn.relu(_dense(params["from_latent"], quantised_BE)))
    return (loss + jnp.sum((decoded_BF - x_BF) ** 2)) / len(x_BF)


def _revive(codebooks_QCE, codes_NQ: np.ndarray, residuals, rng):
    """Returns the codebooks with unused codes moved to the residuals of random vectors."""
    codebooks = np.array(codebooks_QCE)
    for level, (codes_N, residual_NE) in enumerate(zip(codes_NQ.T, residuals, strict=True)):
        unused = np.setdiff1d(np.arange(codebooks.shape[1]), codes_N)
        codebooks[level, unused] = np.asarray(residual_NE)[rng.integers(len(codes_N), size=len(unused))]
    return jnp.asarray(codebooks)
