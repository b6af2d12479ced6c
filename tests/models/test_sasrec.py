"""SASRec against its formulas in plain NumPy, and properties of packed rows."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from packed_rows import encode_queries, pack, random_params

from rec_jax.hashing import row_keys
from rec_jax.mesh import MeshConfig, make_mesh
from rec_jax.models.base import define_model, init_model
from rec_jax.models.sasrec import SASRec, SASRecConfig
from rec_jax.nn.parallel import partition

NUM_ITEMS, MAX_LEN = 20, 12


@cache  # tests of one model share its programs
def make(**kwargs):
    config = SASRecConfig(**({"width": 8, "ff_width": 12, "num_heads": 2, "dropout": 0.0} | kwargs))
    model = define_model(lambda rngs: SASRec(config, NUM_ITEMS, MAX_LEN, rngs=rngs))
    return config, model, random_params(model)


def encode(model, params, histories, key_B=None):
    """Returns x_SD of one packed row."""
    return np.asarray(_encode(model, params, pack([histories]), key_B))[0]


@partial(jax.jit, static_argnums=0)
def _encode(model, params, batch, key_B):
    return model.bind(params)(batch, key_B)


def reference(config, params, history, hidden=None):
    """Returns f64[S, D], the query vector at every event of one history, computed for one head and one query
    at a time.

    hidden: a list to which the output of each layer is appended."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    full_width = config.full_width or config.width
    removed_dims = ((0, 0), (0, full_width - config.width))

    def norm(x, p):
        x = np.pad(x, removed_dims)
        x = x - x.mean(-1, keepdims=True)
        unit = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return unit[:, : config.width] * p["scale"] + p["bias"]

    def linear(x, p):
        return x @ p["kernel"] + p["bias"]

    def rotate(x, position):
        half = len(x) // 2
        out = np.empty_like(x)
        for i in range(half):
            angle = position * 10_000.0 ** (-i / half)
            out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
            out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
        return out

    def attention(x, memory, p):
        q = linear(x, p["query"])
        k, v = np.moveaxis(np.tensordot(memory, p["key_value"]["kernel"], 1) + p["key_value"]["bias"], 1, 0)
        width = config.head_width or config.width // config.num_heads
        out = np.zeros_like(q)
        for head in range(config.num_heads):
            part = slice(head * width, (head + 1) * width)
            for s in range(len(x)):
                logits = []
                for t in range(s + 1):
                    a, b = q[s, part], k[t, part]
                    if config.position == "rotary":
                        a, b = rotate(a, s), rotate(b, t)
                    logits.append(a @ b / np.sqrt(width))
                weights = np.exp(logits - np.max(logits))
                out[s, part] = (weights / weights.sum()) @ v[: s + 1, part]
        return linear(out, p["out"])

    x = p["items"]["embedding"][history]
    if config.item_dim:
        x = x @ p["project"]["kernel"]
    x = x * np.sqrt(full_width)
    if config.position == "learned":
        x = x + p["positions"]["embedding"][: len(history)]
    for index in range(config.num_layers):
        block = p["blocks"][0 if config.share_layers else index]
        y = norm(x, block["attention_norm"])
        residual = x if config.norm == "pre" else y
        memory = x if config.norm == "original" else y
        x = residual + attention(y, memory, block["attention"])
        y = norm(x, block["ff_norm"])
        residual = x if config.norm == "pre" else y
        x = residual + linear(np.maximum(linear(y, block["ff"]["up"]), 0), block["ff"]["down"])
        if hidden is not None:
            hidden.append(x)
    x = norm(x, p["final_norm"])
    if config.item_dim:
        x = x @ p["project"]["kernel"].T
    if config.l2_normalize:
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return x / config.temperature


HISTORIES = [[3, 7, 7, 1], [20], [5, 6, 2, 9, 11]]


def references(config, params):
    return np.concatenate([reference(config, params, history) for history in HISTORIES])


def assert_equals_reference(x_SD, config, params):
    expected = references(config, params)
    np.testing.assert_allclose(x_SD[: len(expected)], expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("norm, position", [("pre", "rotary"), ("post", "learned"), ("original", "rotary")])
def test_packed_rows_equal_the_reference_of_each_history(norm, position):
    config, model, params = make(norm=norm, position=position)
    assert_equals_reference(encode(model, params, HISTORIES), config, params)


OPTIONS = [
    {"num_heads": 3, "head_width": 2, "full_width": 11, "norm": "pre"},
    {"share_layers": True, "num_layers": 3},
    {"num_layers": 0},
    {
        "num_heads": 1,
        "head_width": 6,
        "full_width": 9,
        "item_dim": 5,
        "share_layers": True,
        "norm": "original",
    },
]


@pytest.mark.parametrize("kwargs", OPTIONS, ids=str)
def test_smaller_models_equal_the_reference(kwargs):
    config, model, params = make(**kwargs)
    assert_equals_reference(encode(model, params, HISTORIES), config, params)
    table = model.bind(params).item_vectors()
    assert table.shape == (NUM_ITEMS + 1, config.item_dim or config.width)
    np.testing.assert_array_equal(table, params["items"]["embedding"])


def test_initial_inputs_with_a_projection_are_as_large_as_without():
    config = SASRecConfig(width=128, item_dim=16, num_layers=0)
    _, params = init_model(lambda rngs: SASRec(config, 500, MAX_LEN, rngs=rngs), seed=0)
    assert list(params["project"]) == ["kernel"]
    assert np.std(params["items"]["embedding"] @ params["project"]["kernel"]) == pytest.approx(0.02, rel=0.1)


def test_heads_wider_than_the_input_can_be_sharded():
    """Each of two devices has half of the heads, which together are as wide as the input."""
    config, model, params = make(num_heads=4, head_width=4, num_layers=1)
    mesh = make_mesh(MeshConfig(data=1, model=2))
    specs = partition(params, model.dims, mesh, fully_sharded=False)
    assert specs["blocks"][0]["attention"]["query"]["kernel"] == P(None, "model")

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, P()), out_specs=P(), check_vma=False)
    def run(params, batch):
        return model.bind(params)(batch)

    assert_equals_reference(run(params, pack([HISTORIES]))[0], config, params)


def test_shared_layers_have_one_block_but_separate_dropout():
    _, model, params = make(share_layers=True, num_layers=2, dropout=0.5, norm="pre")
    assert list(params["blocks"]) == [0]
    # A block that only adds a bias, so that its output shows the dropout mask.
    silent = jax.tree.map(np.zeros_like, params)
    silent["blocks"][0]["ff"]["down"]["bias"] += 1.0

    @jax.jit
    def run(params, batch):
        hidden = []
        model.bind(params)(batch, row_keys(jnp.uint32(0), jnp.arange(1)), hidden=hidden)
        return hidden

    outputs = run(silent, pack([[list(range(1, 13))]]))
    first, second = np.asarray(outputs[0]), np.asarray(outputs[1] - outputs[0])
    assert set(np.unique(first)) == set(np.unique(second)) == {0.0, 2.0}
    assert np.any(first != second)


@pytest.mark.parametrize("kwargs", [{"norm": "post", "position": "learned"}, *OPTIONS[-2:]], ids=str)
def test_query_positions_and_outputs_of_layers(kwargs):
    config, model, params = make(**kwargs)
    columns = np.array([3, 9])  # the last events of the first history and of the third
    x_QD, hidden = encode_queries(model, params, pack([HISTORIES]), (np.zeros(2, int), columns))
    np.testing.assert_allclose(x_QD, encode(model, params, HISTORIES)[columns], rtol=1e-5, atol=1e-6)
    expected = []
    reference(config, params, HISTORIES[2], expected)
    assert len(hidden) == len(expected) == config.num_layers
    for x_BSD, expected_SD in zip(hidden[:-1], expected[:-1], strict=True):
        np.testing.assert_allclose(x_BSD[0, 5:10], expected_SD, rtol=2e-4, atol=2e-5)
    if hidden:
        np.testing.assert_allclose(hidden[-1][1], expected[-1][-1], rtol=2e-4, atol=2e-5)


def test_a_kernel_that_is_not_an_array_projects_by_its_own_methods():
    _, model, params = make(**OPTIONS[-1])
    kernel = params["project"]["kernel"]

    @jax.tree_util.register_pytree_node_class
    class Halves:
        """A kernel that stores its halves, as a quantized kernel stores codes."""

        def __init__(self, half):
            self.half = half

        @property
        def shape(self):
            return self.half.shape

        def __getitem__(self, index):
            assert index is ...
            return self

        def matmul(self, x):
            return x @ (2 * self.half)

        def matmul_transposed(self, x):
            return x @ (2 * self.half).T

        def tree_flatten(self):
            return (self.half,), None

        @classmethod
        def tree_unflatten(cls, _, leaves):
            return cls(*leaves)

    changed = params | {"project": {"kernel": Halves(jnp.asarray(kernel / 2))}}
    expected = encode(model, params, HISTORIES)
    np.testing.assert_allclose(encode(model, changed, HISTORIES), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_unit", [False, True])
def test_a_table_that_is_not_an_array_is_returned_as_it_is_or_normalised(is_unit):
    _, model, params = make(l2_normalize=is_unit)

    class Doubled:
        shape = params["items"]["embedding"].shape

        def __getitem__(self, index):
            assert index is ...
            return self

        def dequantize(self):
            return jnp.asarray(params["items"]["embedding"] * 2)

    table = Doubled()
    vectors = model.bind(params | {"items": {"embedding": table}}).item_vectors()
    if is_unit:
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(vectors, model.bind(params).item_vectors(), rtol=1e-5)
    else:
        assert vectors is table


def test_normalised_scores_are_cosines_divided_by_the_temperature():
    config, model, params = make(l2_normalize=True, temperature=0.05, num_layers=1)
    x_SD = encode(model, params, HISTORIES)
    expected = references(config, params)
    table = np.asarray(params["items"]["embedding"], np.float64)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    scores = x_SD @ model.bind(params).item_vectors().T
    np.testing.assert_allclose(scores[: len(expected)], expected @ table.T, rtol=1e-3, atol=1e-3)
    assert np.abs(scores).max() <= 20 * (1 + 1e-5)


@pytest.mark.parametrize("norm, position", [("post", "learned"), ("original", "rotary")])
def test_later_events_and_other_histories_are_not_used(norm, position):
    _, model, params = make(norm=norm, position=position)
    x_SD = encode(model, params, HISTORIES)
    y_SD = encode(model, params, [[3, 7, 7, 8], [20], [5, 6, 2, 10, 4]])
    earlier, changed = [0, 1, 2, 4, 5, 6, 7], [3, 8, 9]
    np.testing.assert_array_equal(x_SD[earlier], y_SD[earlier])
    assert np.all(np.any(x_SD[changed] != y_SD[changed], axis=1))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_heads": 6, "width": 64}, "num_heads=6 does not divide width=64"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"width": 0}, "width=0"),
        ({"ff_width": 0}, "ff_width=0"),
        ({"num_layers": -1}, "num_layers=-1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"width": 6, "num_heads": 2, "position": "rotary"}, "head_width=3 .* even"),
        ({"head_width": 3, "position": "rotary"}, "head_width=3 .* even"),
        ({"head_width": -1}, "head_width=-1"),
        ({"item_dim": -1}, "item_dim=-1"),
        ({"item_dim": 4, "l2_normalize": True}, "item_dim=4 .* l2_normalize"),
        ({"width": 64, "full_width": 63}, "full_width=63"),
        ({"full_width": -1}, "full_width=-1"),
    ],
)
def test_invalid_configs_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SASRecConfig(**kwargs)
