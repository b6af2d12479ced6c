"""The training step against a naive step on padded histories, and the loader alone."""

import collections
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from experiments.speed.lengths import LENGTHS, load_lengths
from experiments.speed.naive import bce_loss, make_naive_step, pad_batch
from experiments.speed.timing import interleaved, peak_run
from rec_jax.data.datasets import DataConfig
from rec_jax.data.pipeline import BatchSource, EpochPlan
from rec_jax.mesh import MeshConfig, make_mesh, place_batch
from rec_jax.models.base import init_model
from rec_jax.models.sasrec import SASRec, SASRecConfig
from rec_jax.objectives.catalogue import Catalogue
from rec_jax.objectives.negatives import ItemPrior, Negatives, UniformSampler
from rec_jax.objectives.token_loss import BCEConfig, make_token_loss
from rec_jax.run_config import ExperimentConfig
from rec_jax.train.loop import TrainConfig
from rec_jax.training import make_step

NUM_USERS = 128  # per batch
NUM_BATCHES = 4  # different batches, used alternately
MAX_STEPS_AHEAD = 4  # steps dispatched early. XLA:CPU can hang on a collective when its queue (32) is full
BLOCK_SECS = 1.0  # duration of the steps between two clock readings
MICRO_TOKENS = 800  # tokens per micro-batch on a device: they fit a core's cache
MODEL = SASRecConfig(width=50, ff_width=50, num_layers=2, num_heads=1, dropout=0.2, norm="original")
LOSS = BCEConfig(num_negatives=1, sharing="position")


def measure_training(name: str, repeats: int) -> dict:
    """Compares both steps on the lengths of one data set: naive, ours and peak alternate, `repeats` times."""
    histories, split, lengths = load_lengths(name)
    max_len = LENGTHS[name].max_len
    targets_U = np.clip(split.train_end - histories.offsets[:-1] - 1, 0, max_len)
    model, params = init_model(lambda rngs: SASRec(MODEL, histories.num_items, max_len, rngs=rngs), seed=0)
    difference = loss_difference(model, params, histories, split, max_len)
    print(f"{name}: {lengths} lengths; the two losses differ by {difference:.1e} without dropout", flush=True)

    naive = naive_loop(params, histories, split, max_len)
    ours = faster_loop(
        our_loop(model, params, histories, split, max_len, make_mesh(MeshConfig(data=num)), targets_U)
        for num in sorted({1, jax.device_count()})
    )
    run_peak, peak_flops = peak_run()
    with tqdm.tqdm(total=repeats, desc=f"{name}: pairs", mininterval=1.0) as bar:
        runs = {"naive": naive, "ours": ours, "peak": run_peak}
        secs = interleaved(runs, repeats, lambda _: bar.update(1))
    naive_rate, our_rate = (loop.num_tokens / secs[key] for key, loop in (("naive", naive), ("ours", ours)))
    peak = peak_flops / secs["peak"]
    flops = useful_flops_per_token(MODEL, targets_U)
    ratio = our_rate / naive_rate
    return {
        "ours_tokens_per_sec": float(np.median(our_rate)),
        "naive_tokens_per_sec": float(np.median(naive_rate)),
        "ratio": float(np.median(ratio)),
        "ratio_min": float(ratio.min()),
        "ratio_max": float(ratio.max()),
        "pairs": repeats,
        "ours_sequences_per_sec": float(np.median(our_rate) / targets_U.mean()),
        "naive_sequences_per_sec": float(np.median(naive_rate) / targets_U.mean()),
        "percent_of_limit": float(np.median(100 * our_rate * flops / peak)),
        "naive_percent_of_limit": float(np.median(100 * naive_rate * flops / peak)),
        "limit": f"f32 matmul of 2048 x 2048 on all cores, in the same run: {np.median(peak) / 1e9:.0f} "
        f"GFLOP/s; {flops:.0f} FLOP per real token (6 x the multiply-adds of the forward pass; causal "
        "attention within the history only; no optimizer)",
        "lengths": lengths,
        "fill": ours.fill,
        "naive_fill": naive.fill,
        "ours_step": ours.describe(),
        "naive_step": naive.describe(),
        "loss_difference": difference,
        "max_len": max_len,
        "items": histories.num_items,
    }


class Loop:
    """Runs training steps over NUM_BATCHES batches, placing each batch, and waits for the last step.

    One call repeats the batches until it takes about BLOCK_SECS.
    """

    def __init__(self, step, state, batches: list, place, num_devices: int):
        self._step, self._state, self._batches, self._place = step, state, batches, place
        self._num_devices = num_devices
        self._tokens = sum(int((batch.targets > 0).sum()) for batch in batches)
        self.fill = self._tokens / sum(batch.targets.size for batch in batches)
        self._ahead = collections.deque()
        self._rounds = 1
        self()  # compiles
        start = time.perf_counter()
        self()
        self._rounds = max(1, round(BLOCK_SECS / (time.perf_counter() - start)))

    @property
    def num_tokens(self) -> int:
        """The number of real tokens in one call."""
        return self._tokens * self._rounds

    def describe(self) -> dict:
        return {
            "tokens_per_step": self._tokens / len(self._batches),
            "steps_per_reading": self._rounds * len(self._batches),
            "devices": self._num_devices,
            "batch_rows": len(self._batches[0].items),
        }

    def __call__(self):
        for _ in range(self._rounds):
            for batch in self._batches:
                self._state, aux = self._step(self._state, self._place(batch))
                self._ahead.append(aux)
                if len(self._ahead) > MAX_STEPS_AHEAD:
                    jax.block_until_ready(self._ahead.popleft())
        self._ahead.clear()
        jax.block_until_ready(self._state)


def naive_loop(params, histories, split, max_len: int) -> Loop:
    optimizer = optax.adam(1e-3, b2=0.98)
    step = make_naive_step(histories.num_items, MODEL.num_layers, MODEL.num_heads, MODEL.dropout, optimizer)
    users = np.random.default_rng(0).permutation(histories.num_users)
    batches = [
        pad_batch(histories, split, users[i * NUM_USERS : (i + 1) * NUM_USERS], max_len)
        for i in range(NUM_BATCHES)
    ]
    params = jax.tree.map(jnp.copy, params)  # the step consumes its state
    state = (params, optimizer.init(params), jax.random.key(0))
    return Loop(step, state, batches, jax.device_put, 1)


def packed_source(histories, split, max_len: int, num_devices: int, targets_U) -> BatchSource:
    """Batches of about NUM_USERS users each; the number of devices divides their number of rows."""
    source = BatchSource(histories, split, EpochPlan(max_len=max_len, batch_rows=1, epochs=1, seed=0))
    rows = NUM_USERS * source.plan.num_rows / np.count_nonzero(targets_U)
    per_device = max(1, round(rows / num_devices))
    micro = min(per_device, max(1, MICRO_TOKENS // max_len))
    batch_rows = num_devices * micro * max(1, round(per_device / micro))
    return BatchSource(histories, split, EpochPlan(max_len=max_len, batch_rows=batch_rows, epochs=1, seed=0))


def our_loop(model, params, histories, split, max_len: int, mesh, targets_U) -> Loop:
    source = packed_source(histories, split, max_len, mesh.size, targets_U)
    batches = [source[i] for i in range(NUM_BATCHES)]
    rows, max_len = batches[0].items.shape
    micro_rows = min(rows // mesh.size, max(1, MICRO_TOKENS // max_len))
    config = ExperimentConfig(
        data=DataConfig(max_len=max_len),
        model=MODEL,
        loss=LOSS,
        train=TrainConfig(batch_rows=rows, micro_rows=micro_rows),
        mesh=MeshConfig(data=mesh.size),
    )
    step = make_step(config, model, np.ones(histories.num_items + 1), mesh)
    state = step.init(jax.tree.map(jnp.copy, params))
    return Loop(step, state, batches, lambda batch: place_batch(batch, mesh), mesh.size)


def faster_loop(loops) -> Loop:
    """Returns the faster loop, on one device or on all: several share the work but must sum gradients."""
    loops = {loop: loop for loop in loops}
    secs = interleaved(loops, repeats=3)
    return max(loops, key=lambda loop: loop.num_tokens / np.median(secs[loop]))


def loss_difference(model, params, histories, split, max_len: int) -> float:
    """Returns |packed loss - padded loss| / padded loss for the same users.

    Without dropout, and with the same negative at every token.
    """
    source = BatchSource(histories, split, EpochPlan(max_len=max_len, batch_rows=16, epochs=1, seed=0))
    packed, padded = source[0], pad_batch(histories, split, source.users(0), max_len)
    negative = 7

    def ours(params):
        module = model.bind(params)
        ids = jnp.full((1, 1, 1), negative)
        negatives, prior = Negatives(ids, jnp.zeros((1, 1, 1)), ids), ItemPrior(UniformSampler(negative))
        catalogue = Catalogue(module.item_vectors())
        loss = make_token_loss(LOSS)(module(packed), catalogue, packed, negatives, prior)
        return loss, jnp.sum(packed.targets > 0)

    def naive(params):
        negatives = np.full(padded.items.shape, negative)
        return bce_loss(params, padded, negatives, MODEL.num_layers, MODEL.num_heads, lambda x, site: x)

    (our_sum, our_count), (naive_sum, naive_count) = jax.jit(ours)(params), jax.jit(naive)(params)
    if int(our_count) != int(naive_count):
        raise AssertionError(f"{int(our_count)} packed tokens but {int(naive_count)} padded ones")
    return float(abs(our_sum - naive_sum) / naive_sum)


def useful_flops_per_token(config: SASRecConfig, targets_U) -> float:
    """The floating-point operations per real token that forward and backward passes need at least.

    A multiply-add counts as two, and the backward pass as twice the forward pass. Attention counts only the
    keys that a token attends to: its own history up to itself.
    """
    n = targets_U.astype(np.float64)
    keys = (n * (n + 1)).sum() / 2 / n.sum()
    dense = 4 * config.width**2 + 2 * config.width * config.ff_width
    multiply_adds = config.num_layers * (dense + 2 * config.width * keys) + 2 * config.width
    return float(6 * multiply_adds)


def measure_loader(repeats: int) -> dict:
    """Measures one epoch of packed batches, built in one process without training, on Beauty lengths."""
    histories, split, lengths = load_lengths("beauty")
    sequences_per_sec = []
    for epoch_seed in range(repeats):
        source = BatchSource(
            histories, split, EpochPlan(max_len=50, batch_rows=32, epochs=1, seed=epoch_seed)
        )
        start = time.perf_counter()
        tokens = sum(np.count_nonzero(source[i].targets) for i in range(len(source)))
        sequences_per_sec.append(source.plan.users_by_len.size / (time.perf_counter() - start))
    return {
        "sequences_per_sec": float(np.median(sequences_per_sec)),
        "sequences_per_sec_min": min(sequences_per_sec),
        "sequences_per_sec_max": max(sequences_per_sec),
        "tokens_per_epoch": int(tokens),
        "batch_rows": 32,
        "lengths": lengths,
    }
