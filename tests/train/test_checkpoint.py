import os
import pathlib
import shutil
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, os.path.dirname(__file__))
import toy_run

from rec_jax.train.checkpoint import DamagedError, Saver, _digest, is_finite, restore, restore_best

_ROOT = pathlib.Path(__file__).parents[2]
RUN = {"config": {"width": 4, "ks": (5, 10), "train": {"epochs": 3}}, "split": "abc"}


def _state(step: int):
    return {
        "step": jnp.asarray(step, jnp.int32),
        "params": {
            "table": jnp.sin(jnp.arange(16_000.0)).reshape(800, 20) * step,
            "half": jnp.full(5, step, jnp.bfloat16),
        },
        "opt_state": (jnp.zeros(3), {"count": jnp.asarray(step)}, ()),
    }


def _save(directory, steps, best=(), keep=2):
    saver = Saver(directory, keep)
    for step in steps:
        record = {"step": step, "run_info": RUN, "data": {"next_index": np.int64(step)}}
        saver.save(_state(step), record, best=step in best)
    saver.close()


def _assert_equal(restored, step: int):
    assert restored.record["step"] == step and restored.record["data"] == {"next_index": step}
    jax.tree.map(np.testing.assert_array_equal, restored.state, _state(step))


def _steps(directory, kind: str) -> list[int]:
    return sorted(int(path.name) for path in (directory / kind).iterdir())


def test_restores_the_newest_of_best_and_latest(tmp_path):
    _save(tmp_path, range(1, 8), best=(1, 2, 4))
    assert _steps(tmp_path, "latest") == [6, 7] and _steps(tmp_path, "best") == [2, 4]
    _assert_equal(restore(tmp_path, _state(0)), 7)
    best = restore_best(tmp_path, _state(0)["params"])
    jax.tree.map(np.testing.assert_array_equal, best.state, _state(4)["params"])
    assert restore_best(tmp_path, _state(0)["params"], max_step=3).record["step"] == 2
    _save(tmp_path, [8], best=(8,))
    _assert_equal(restore(tmp_path, _state(0)), 8)


def test_nothing_saved_is_none(tmp_path):
    assert restore(tmp_path / "none", _state(0)) is None
    assert restore_best(tmp_path / "none", _state(0)["params"]) is None


def test_restores_into_the_placement_of_the_target(tmp_path):
    _save(tmp_path, [3])
    mesh = Mesh(np.array(jax.devices()), ("data",))
    target = jax.device_put(_state(0), NamedSharding(mesh, PartitionSpec()))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    target["params"]["table"] = jax.device_put(target["params"]["table"], rows)
    restored = restore(tmp_path, target)
    _assert_equal(restored, 3)
    assert jax.tree.map(lambda x: x.sharding, restored.state) == jax.tree.map(lambda x: x.sharding, target)


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
    add = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    saver, state = Saver(tmp_path, 1), {"params": {"w": jnp.zeros((1000, 1000))}}
    saver.save(state, {"step": 1, "run_info": RUN}, best=True)
    for _ in range(20):
        state = add(state)
    saver.close()
    assert not np.asarray(restore(tmp_path, state).state["params"]["w"]).any()


def test_a_checkpoint_may_be_refused(tmp_path):
    _save(tmp_path, [3])

    def refuse(record, path):
        assert record["run_info"]["split"] == "abc" and path == tmp_path / "latest/3"
        raise ValueError("another run")

    with pytest.raises(ValueError, match="another run"):
        restore(tmp_path, _state(0), refuse)
    assert _steps(tmp_path, "latest") == [3]  # It is not damaged.


def _files(path):
    return sorted(p for p in path.rglob("*") if p.is_file())


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncate, _flip, pathlib.Path.unlink])
def test_damage_to_any_file_falls_back_or_does_no_harm(tmp_path, capsys, damage):
    """Whatever file is hit: the newest checkpoint equals what was saved, or the one before is."""
    _save(tmp_path / "whole", [3, 5])
    num_fallbacks = 0
    files = [path.relative_to(tmp_path / "whole") for path in _files(tmp_path / "whole/latest/5")]
    for i, file in enumerate(files):
        directory = tmp_path / str(i)
        shutil.copytree(tmp_path / "whole", directory)
        damage(directory / file)
        restored = restore(directory, _state(0))
        _assert_equal(restored, restored.record["step"])
        said = capsys.readouterr().err
        if restored.record["step"] == 3:
            num_fallbacks += 1
            assert f"{directory / 'latest/5'} is damaged" in said
            assert "falling back to the last good checkpoint, step 3" in said
            assert (directory / "damaged/latest-5").is_dir()
            assert _steps(directory, "latest") == [3]
    assert num_fallbacks >= 3  # The record, the tree's description and the arrays matter.


def test_deleted_folder_falls_back(tmp_path):
    _save(tmp_path, [3, 5])
    shutil.rmtree(tmp_path / "latest/5/state")
    _assert_equal(restore(tmp_path, _state(0)), 3)
    shutil.rmtree(tmp_path / "latest/3")
    assert restore(tmp_path, _state(0)) is None


def test_the_best_is_a_fallback_for_the_latest(tmp_path):
    _save(tmp_path, [3, 5], best=(3,))
    _truncate_all(tmp_path / "latest")
    _assert_equal(restore(tmp_path, _state(0)), 3)


def test_damaged_best_falls_back(tmp_path, capsys):
    _save(tmp_path, [3, 5], best=(3, 5))
    _truncate_all(tmp_path / "best/5")
    assert restore_best(tmp_path, _state(0)["params"]).record["step"] == 3
    assert "best/5 is damaged" in capsys.readouterr().err


def _truncate_all(path):
    for file in _files(path):
        _truncate(file)


def test_none_whole_names_the_way_out(tmp_path):
    _save(tmp_path, [3, 5])
    _truncate_all(tmp_path / "latest")
    with pytest.raises(DamagedError, match="none of the 2 checkpoints.*another workdir, or delete"):
        restore(tmp_path, _state(0))
    assert _steps(tmp_path, "latest") == [3, 5]  # Nothing was moved or deleted.


def test_half_written_folders_are_ignored_and_cleaned(tmp_path):
    _save(tmp_path, [3])
    half = tmp_path / "latest/5.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "latest/3", half)
    _truncate_all(half)
    _assert_equal(restore(tmp_path, _state(0)), 3)
    _save(tmp_path, [5])
    assert _steps(tmp_path, "latest") == [3, 5]


def test_is_finite():
    assert is_finite({"a": jnp.ones(3), "b": jnp.arange(3), "c": jnp.ones(2, jnp.bfloat16)})
    assert is_finite({})
    for bad in (jnp.nan, jnp.inf):
        assert not is_finite({"a": jnp.ones(3), "b": jnp.asarray([1, bad], jnp.bfloat16)})


def test_a_damaged_newest_checkpoint_is_trained_again(tmp_path, capsys):
    """The whole run, its newest or its best damaged on the way: the same end, and it is said."""

    def rising(params):
        return {"ndcg@10": -toy_run.evaluate(params)["ndcg@10"]}

    whole = toy_run.run(tmp_path / "b", evaluate_fn=rising)
    toy_run.run(tmp_path / "a", epochs=2, evaluate_fn=rising)
    _truncate_all(tmp_path / "a/checkpoints/best/14")  # The newest, and the best.
    resumed = toy_run.run(tmp_path / "a", evaluate_fn=rising)
    assert "falling back to the last good checkpoint, step 10" in capsys.readouterr().err
    assert toy_run.digest(resumed.state) == toy_run.digest(whole.state)
    assert resumed.best_value == whole.best_value
    assert [line for line in resumed.history if "val/ndcg@10" in line] == [
        line for line in whole.history if "val/ndcg@10" in line
    ]


def test_a_lost_best_is_replaced(tmp_path, capsys):
    assert toy_run.run(tmp_path, epochs=2).best_step == 7
    shutil.rmtree(tmp_path / "checkpoints/best/7")
    result = toy_run.run(tmp_path, epochs=2)
    assert "the best checkpoint (step 7) is lost" in capsys.readouterr().err
    assert result.best_step == 14  # Evaluated again, as it is where the run resumes.
    assert toy_run.evaluate(result.best_params)["ndcg@10"] == result.best_value


_LIMITED = """
import resource, sys
sys.path.insert(0, {folder!r})
import toy_run
toy_run.run({workdir!r}, epochs=1, width=20_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
try:
    toy_run.run({workdir!r}, epochs=3, width=20_000)
except toy_run.SaveError as error:
    sys.exit(f"error: {{error}}")
"""


def test_full_disk_ends_with_a_message_and_the_checkpoint_intact(tmp_path):
    """A limit on the size of files stands in for the full disk: both fail a write half-way."""
    code = _LIMITED.format(folder=os.path.dirname(__file__), workdir=str(tmp_path / "a"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "JAX_NUM_CPU_DEVICES": "1"},
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr  # Orbax alone would log some twenty of them.
    message = done.stderr.strip().splitlines()[-1]
    assert "could not be written" in message and "the disk is full" in message
    assert "step 7 is intact" in message
    resumed = toy_run.run(tmp_path / "a", epochs=3, width=20_000)
    whole = toy_run.run(tmp_path / "b", epochs=3, width=20_000)
    assert toy_run.digest(resumed.state) == toy_run.digest(whole.state)


def test_a_checksum_does_not_depend_on_the_sharding():
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    expected = zlib.crc32(x.reshape(-1).view(np.uint8))
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    P = PartitionSpec
    for spec in (P(), P("a"), P(("a", "b")), P(("b", "a")), P(None, "a"), P("a", "b")):
        assert _digest(jax.device_put(x, NamedSharding(mesh, spec))) == expected, spec
    assert _digest(jnp.float32(1)) == zlib.crc32(np.float32(1).tobytes())
