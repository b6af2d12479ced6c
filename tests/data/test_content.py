"""Content of items: all kinds of files give the same vectors, and mistakes are reported."""

import dataclasses
import json

import numpy as np
import pytest

from rec_jax.data.content import content_vectors, hashed_tokens
from rec_jax.data.datasets import Dataset
from rec_jax.data.histories import Histories, leave_one_out


def dataset(titles=None):
    histories = Histories(
        items=np.array([1, 2, 3], np.int32),
        times=None,
        offsets=np.array([0, 3]),
        user_ids=np.array(["u"]),
        item_ids=np.array(["", "a", "b", "c"], object),
        titles=titles or {},
    )
    return Dataset(histories, leave_one_out(histories), [], None)


def test_rare_tokens_have_larger_weights():
    x = hashed_tokens([["x", "rare"], ["x"], ["x", "x"], []], dims=1000)
    assert sorted(np.abs(x[0])[x[0] != 0]) == pytest.approx(sorted([1 + np.log(4 / 3), 1 + np.log(4)]))
    np.testing.assert_array_equal(x[1], x[2])
    assert not x[3].any() and x.shape == (4, 1000)


def test_attributes_and_titles_make_the_same_vectors(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"a": ["red", "old"], "c": ["red"], "other": ["old"]}))
    vectors, text = content_vectors(str(tmp_path / "x.json"), 64, dataset())
    assert vectors.shape == (4, 64) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [0, 1, 0, 1], rtol=1e-6)
    assert "3 items" in text and "1 item without content" in text
    titles, _ = content_vectors("", 64, dataset({"a": "Old red", "c": "Red!"}))
    np.testing.assert_allclose(titles, vectors)
    (tmp_path / "x.dat").write_text("a::Old::Red\nc::Red::\n")
    from_file, _ = content_vectors(str(tmp_path / "x.dat"), 64, dataset())
    np.testing.assert_allclose(from_file, vectors)


def test_vectors_in_item_order_and_by_id_agree(tmp_path):
    x = np.array([[3, 4], [0, 2], [0, 0]])
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", ids=["b", "z", "a"], vectors=x[[1, 1, 0]])
    in_order, _ = content_vectors(str(tmp_path / "x.npy"), 64, dataset())
    by_id, text = content_vectors(str(tmp_path / "x.npz"), 64, dataset())
    np.testing.assert_allclose(in_order, [[0, 0], [0.6, 0.8], [0, 1], [0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(in_order, by_id)
    assert "1 item without content" in text


@pytest.mark.parametrize(
    "name, write, message",
    [
        ("x.npy", lambda path: np.save(path, np.ones((2, 5))), r"shape \[2, 5\], but the log has 3 items"),
        ("x.npy", lambda path: np.save(path, np.full((3, 5), np.nan)), "NaN"),
        (
            "x.npz",
            lambda path: np.savez(path, x=np.ones(3)),
            "has the arrays x, but needs `ids` and `vectors`",
        ),
        ("x.json", lambda path: path.write_text("[1]"), "one JSON object"),
        ("x.json", lambda path: path.write_text("{"), "is not valid JSON"),
        (
            "x.json",
            lambda path: path.write_text('{"q": [1]}'),
            "no content for any item of the log, such as item 'a'",
        ),
    ],
)
def test_mistakes_in_content_files_are_reported(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        content_vectors(str(tmp_path / name), 64, dataset())


def test_a_log_without_titles_gives_vectors_of_neighbours():
    data = dataset()
    items = np.array([1, 2, 1, 2, 3, 3, 1, 2, 1, 2, 3, 3], np.int32)
    data = dataclasses.replace(
        data, histories=dataclasses.replace(data.histories, items=items, offsets=np.array([0, 6, 12]))
    )
    data = dataclasses.replace(data, split=leave_one_out(data.histories))
    vectors, text = content_vectors("", 64, data)
    assert "content from the training histories: 3 items" in text and "1 item without content" in text
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [0, 1, 1, 0], atol=1e-6)


def test_missing_content_is_reported(tmp_path):
    with pytest.raises(ValueError, match="semantic_ids.content='nowhere.json' does not exist"):
        content_vectors("nowhere.json", 64, dataset())
    with pytest.raises(
        ValueError, match="semantic_ids.content='' has no content .*: set semantic_ids.content to"
    ):
        content_vectors("", 64, dataset())
