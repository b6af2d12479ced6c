"""Vectors as a few codes each: residual k-means, and the residual-quantised autoencoder."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

_CHUNK = 8_192  # vectors compared with all centres at once
_BATCH = 1_024
_COMMITMENT = 0.25
_SETTLE = 0.3  # share of the epochs, the last ones, in which no code is moved by hand


def kmeans(
    x_NF: np.ndarray, codebook_size: int, rng: np.random.Generator, iterations: int = 20
) -> np.ndarray:
    """f32[codebook_size, F]: Lloyd's centres from a k-means++ start; one that loses its vectors moves to the one
    that is farthest from its own. Source: Arthur & Vassilvitskii, SODA'07, for the start."""
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
        far = np.argsort(-distance_N, kind="stable")[: len(lost)]  # fewer, where there are fewer vectors
        centres[lost[: len(far)]] = x_NF[far]
    return centres


def _nearest(x_NF, centres_CF) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centre of each vector, int[N], and the squared distance to it."""
    codes, distances = [], []
    for first in range(0, len(x_NF), _CHUNK):
        x = x_NF[first : first + _CHUNK]
        squares = np.sum(x**2, 1)[:, None] + np.sum(centres_CF**2, 1) - 2 * x @ centres_CF.T
        codes.append(np.argmin(squares, axis=1))
        distances.append(np.min(squares, axis=1))
    return np.concatenate(codes), np.concatenate(distances)


def residual_kmeans(x_NF: np.ndarray, num_levels: int, codebook_size: int, seed: int) -> tuple:
    """(codes int32[N, Q], centres f32[Q, C, F]): each level is a k-means of what earlier ones leave."""
    rng, rest_NF = np.random.default_rng(seed), x_NF.copy()
    codes, centres = [], []
    for _ in range(num_levels):
        centres.append(kmeans(rest_NF, codebook_size, rng))
        codes.append(_nearest(rest_NF, centres[-1])[0])
        rest_NF = rest_NF - centres[-1][codes[-1]]
    return np.stack(codes, axis=1).astype(np.int32), np.stack(centres)


def rqvae(
    x_NF: np.ndarray, num_levels: int, codebook_size: int, seed: int, *, epochs: int, width: int, latent: int
) -> np.ndarray:
    """int32[N, Q]: codes of the latents of an autoencoder that has learnt to do with them.

    width: hidden units of encoder and decoder; latent: dims that are quantised.
    Source: Lee et al., CVPR'22 (arXiv 2203.01941) and TIGER, arXiv 2305.05065, section 3.1.
    Differs: one hidden layer; codes that no item uses after an epoch move to what is left over of random
    items, until `_SETTLE`.
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
            codes_NQ, rests = quantise(params)
            params["codebooks"] = _revive(params["codebooks"], np.asarray(codes_NQ), rests, rng)
    return np.asarray(quantise(params)[0], np.int32)


def _glorot(rng, a: int, b: int) -> np.ndarray:
    return rng.uniform(-1, 1, (a, b)).astype(np.float32) * (6 / (a + b)) ** 0.5


def _dense(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def _encode(params, x_BF):
    return _dense(params["to_latent"], jax.nn.relu(_dense(params["encode"], x_BF)))


def _quantise(z_BE, codebooks_QCE):
    """(codes [B, Q], what is left over before each level [Q][B, E])."""
    codes, rests, rest_BE = [], [], z_BE
    for centres_CE in codebooks_QCE:
        squares_BC = jnp.sum(centres_CE**2, 1) - 2 * rest_BE @ centres_CE.T
        codes.append(jnp.argmin(squares_BC, axis=1))
        rests.append(rest_BE)
        rest_BE = rest_BE - jax.lax.stop_gradient(centres_CE[codes[-1]])
    return jnp.stack(codes, axis=1), rests


def _loss(params, x_BF):
    """Reconstruction, and at each level both sides drawn together: codes to vectors, vectors to codes."""
    z_BE = _encode(params, x_BF)
    codes_BQ, rests = _quantise(z_BE, params["codebooks"])
    chosen = [centres[codes_B] for centres, codes_B in zip(params["codebooks"], codes_BQ.T, strict=True)]
    stop = jax.lax.stop_gradient
    loss = sum(
        jnp.sum((stop(rest) - code) ** 2) + _COMMITMENT * jnp.sum((rest - stop(code)) ** 2)
        for rest, code in zip(rests, chosen, strict=True)
    )
    straight_BE = z_BE + stop(sum(chosen) - z_BE)  # the gradient passes by the choice of codes
    back_BF = _dense(params["decode"], jax.nn.relu(_dense(params["from_latent"], straight_BE)))
    return (loss + jnp.sum((back_BF - x_BF) ** 2)) / len(x_BF)


def _revive(codebooks_QCE, codes_NQ: np.ndarray, rests, rng):
    books = np.array(codebooks_QCE)
    for level, (codes_N, rest_NE) in enumerate(zip(codes_NQ.T, rests, strict=True)):
        dead = np.setdiff1d(np.arange(books.shape[1]), codes_N)
        books[level, dead] = np.asarray(rest_NE)[rng.integers(len(codes_N), size=len(dead))]
    return jnp.asarray(books)
