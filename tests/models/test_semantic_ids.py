"""Quantizers find planted groups, every item gets its own path, and codes of low quality are refused."""

import dataclasses

import numpy as np
import pytest

from rec_jax.data.datasets import DataConfig, load_dataset
from rec_jax.data.simulator import SimulatorConfig
from rec_jax.models.quantizers import kmeans, residual_kmeans, rqvae
from rec_jax.models.semantic_ids import (
    SemanticIds,
    SemanticIdsConfig,
    count_within,
    load_semantic_ids,
    make_semantic_ids,
)

SMALL = SemanticIdsConfig(
    num_levels=2, codebook_size=4, epochs=3, width=8, latent=4, max_shared=1.0, min_used=0.0
)


def planted(seed=0):
    """Returns (vectors f32[161, 6], groups int[160, 2]): 4 distant groups of 4 close groups of 10 vectors
    each. Entry 0 of the vectors is padding."""
    rng = np.random.default_rng(seed)
    far, near = 10 * np.eye(4, 6), np.pad(np.eye(2)[:, ::-1], ((0, 2), (4, 0))) * 2
    near[2:] = -near[:2]
    groups = np.stack(np.divmod(np.repeat(np.arange(16), 10), 4), axis=1)
    x_NF = far[groups[:, 0]] + near[groups[:, 1]] + 0.01 * rng.normal(size=(160, 6))
    return np.pad(x_NF, ((1, 0), (0, 0))).astype(np.float32), groups


def same_partition(a, b) -> bool:
    pairs = {(tuple(x), tuple(y)) for x, y in zip(a, b, strict=True)}
    return len(pairs) == len({x for x, _ in pairs}) == len({y for _, y in pairs})


def test_residual_kmeans_finds_groups_within_groups():
    x_VF, groups = planted()
    codes, centres = residual_kmeans(x_VF[1:], 2, 4, seed=0)
    assert same_partition(codes[:, :1], groups[:, :1]) and same_partition(codes, groups)
    rebuilt = centres[0][codes[:, 0]] + centres[1][codes[:, 1]]
    assert np.abs(rebuilt - x_VF[1:]).max() < 0.1


def test_a_centre_without_vectors_moves():
    # Five distinct vectors, one of which is most frequent: each must get a centre.
    x_NF = np.repeat(np.eye(5, dtype=np.float32), [100, 1, 1, 1, 1], axis=0)
    centres = kmeans(x_NF, 5, np.random.default_rng(0))
    assert {tuple(c) for c in centres} == {tuple(x) for x in np.eye(5)}


def test_fewer_vectors_than_codes():
    x_NF = np.eye(3, dtype=np.float32)
    codes_NQ = residual_kmeans(x_NF, 1, 8, seed=0)[0]
    assert len(np.unique(codes_NQ)) == 3


def test_the_autoencoder_separates_groups_and_depends_only_on_its_seed():
    x_VF, groups = planted()

    def run():
        return rqvae(x_VF[1:] / 10, 2, 8, seed=0, epochs=100, width=16, latent=4)

    codes = run()
    np.testing.assert_array_equal(codes, run())
    assert len(np.unique(codes, axis=0)) >= 8
    pairs = np.unique(np.column_stack([groups[:, :1], codes]), axis=0)
    assert len(pairs) == len(np.unique(codes, axis=0))  # distant groups share no codes


def test_items_with_the_same_codes_are_counted_most_frequent_first():
    codes_NQ = np.array([[1, 1], [0, 2], [1, 1], [1, 1], [0, 1]])
    rank, size = count_within(codes_NQ, np.array([5, 9, 7, 5, 1]))
    np.testing.assert_array_equal(rank, [1, 0, 0, 2, 0])
    np.testing.assert_array_equal(size, [3, 1, 3, 3, 1])


def test_the_trie_by_hand():
    # Paths, sorted: 00 (item 2), 02 (item 3), 21 (item 1).
    trie = SemanticIds(np.array([[0, 0], [2, 1], [0, 0], [0, 2]]), codebook_size=3).trie
    np.testing.assert_array_equal(trie.items, [2, 3, 1])
    np.testing.assert_array_equal(trie.first_child[0], [0, 2])
    np.testing.assert_array_equal(trie.first_child[1], [0, 2, 3])
    np.testing.assert_array_equal(trie.codes[0], [0, 2])
    np.testing.assert_array_equal(trie.codes[1], [0, 2, 1])
    assert trie.max_children == [2, 2]
    np.testing.assert_array_equal(trie.paths_VQ[1:], [[1, 2], [0, 0], [0, 1]])


def test_codes_of_two_items_must_differ():
    with pytest.raises(ValueError, match="no two items may have the same ones"):
        SemanticIds(np.array([[0, 0], [1, 1], [1, 1]]), codebook_size=2)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        SemanticIds(np.array([[0, 0], [1, 2]]), codebook_size=2)


@pytest.mark.parametrize(
    "fields, repeats, message",
    [
        ({"min_used": 0.9, "codebook_size": 16}, 1, "min_used=0.9: level 1 uses only 0.062"),
        ({"max_shared": 0.5}, 1, "max_shared=0.5: 1.000 of the items"),
        ({"codebook_size": 4}, 30, "codebook_size=4: [0-9]+ items share the same codes"),
    ],
)
def test_codes_of_low_quality_are_refused(fields, repeats, message):
    x_VF, _ = planted()
    x_VF = np.round(np.concatenate([x_VF, np.tile(x_VF[1], (repeats, 1))]))  # residuals of level 0 are zero
    config = dataclasses.replace(SMALL, method="kmeans", **fields)
    with pytest.raises(ValueError, match=message):
        make_semantic_ids(x_VF, config, np.ones(len(x_VF)), seed=0)


@pytest.mark.parametrize("fields", [{"codebook_size": 1}, {"min_used": 1.5}, {"epochs": 0}])
def test_invalid_configs_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        SemanticIdsConfig(**fields)


def test_semantic_ids_are_made_once_per_run(tmp_path):
    sim = SimulatorConfig(num_items=40, num_users=30, num_interests=4, mean_len=8)
    data = DataConfig(format="simulator", sim=sim)
    dataset = load_dataset(data, tmp_path / "data")
    config = dataclasses.replace(SMALL, method="kmeans", codebook_size=16)
    codes = load_semantic_ids(config, data, dataset, tmp_path, seed=0)
    written = (tmp_path / "semantic_ids.npz").stat().st_mtime_ns
    again = load_semantic_ids(config, data, dataset, tmp_path, seed=0)
    assert again == codes and (tmp_path / "semantic_ids.npz").stat().st_mtime_ns == written
    assert "40 items" in again.report
    with pytest.raises(ValueError, match="was made from .* use another workdir"):
        load_semantic_ids(dataclasses.replace(config, num_levels=1), data, dataset, tmp_path, seed=0)
    content = tmp_path / "content.json"
    content.write_text('{"i1": ["red"], "i2": ["blue"]}')
    from_file = dataclasses.replace(
        config, content=str(content), min_used=0.0, max_shared=1.0, codebook_size=64
    )
    (tmp_path / "other").mkdir()
    load_semantic_ids(from_file, data, dataset, tmp_path / "other", seed=0)
    content.write_text('{"i1": ["blue"], "i2": ["blue"]}')
    with pytest.raises(ValueError, match="was made from .* use another workdir"):
        load_semantic_ids(from_file, data, dataset, tmp_path / "other", seed=0)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "semantic_ids.npz").unlink()
    with pytest.raises(ValueError, match="semantic_ids.npz is missing, and the model"):
        load_semantic_ids(config, data, dataset, tmp_path, seed=0)
