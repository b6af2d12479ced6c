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
    """A training state whose values depend on the step."""
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


def test_a_folder_without_checkpoints_gives_none(tmp_path):
    assert restore(tmp_path / "none", _state(0)) is None
    assert restore_best(tmp_path / "none", _state(0)["params"]) is None


def test_restores_into_the_sharding_of_the_target(tmp_path):
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


def test_check_may_refuse_a_checkpoint(tmp_path):
    _save(tmp_path, [3])

    def refuse(record, path):
        assert record["run_info"]["split"] == "abc" and path == tmp_path / "latest/3"
        raise ValueError("another run")

    with pytest.raises(ValueError, match="another run"):
        restore(tmp_path, _state(0), refuse)
    assert _steps(tmp_path, "latest") == [3]  # It was not set aside as damaged.


def _files(path):
    return sorted(p for p in path.rglob("*") if p.is_file())


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncate, _flip, pathlib.Path.unlink])
def test_damage_to_any_file_is_harmless_or_falls_back(tmp_path, capsys, damage):
    """Restores the saved state of the newest checkpoint or, if damage is found, of the one before it."""
    _save(tmp_path / "intact", [3, 5])
    num_fallbacks = 0
    files = [path.relative_to(tmp_path / "intact") for path in _files(tmp_path / "intact/latest/5")]
    for i, file in enumerate(files):
        directory = tmp_path / str(i)
        shutil.copytree(tmp_path / "intact", directory)
        damage(directory / file)
        restored = restore(directory, _state(0))
        _assert_equal(restored, restored.record["step"])
        errors = capsys.readouterr().err
        if restored.record["step"] == 3:
            num_fallbacks += 1
            assert f"{directory / 'latest/5'} is damaged" in errors
            assert "falling back to the last good checkpoint, step 3" in errors
            assert (directory / "damaged/latest-5").is_dir()
            assert _steps(directory, "latest") == [3]
    assert num_fallbacks >= 3  # at least the record, the description of the tree, and the arrays


def test_a_deleted_folder_falls_back(tmp_path):
    _save(tmp_path, [3, 5])
    shutil.rmtree(tmp_path / "latest/5/state")
    _assert_equal(restore(tmp_path, _state(0)), 3)
    shutil.rmtree(tmp_path / "latest/3")
    assert restore(tmp_path, _state(0)) is None


def test_a_damaged_latest_falls_back_to_the_best(tmp_path):
    _save(tmp_path, [3, 5], best=(3,))
    _truncate_all(tmp_path / "latest")
    _assert_equal(restore(tmp_path, _state(0)), 3)


def test_a_damaged_best_falls_back_to_the_one_before(tmp_path, capsys):
    _save(tmp_path, [3, 5], best=(3, 5))
    _truncate_all(tmp_path / "best/5")
    assert restore_best(tmp_path, _state(0)["params"]).record["step"] == 3
    assert "best/5 is damaged" in capsys.readouterr().err


def _truncate_all(path):
    for file in _files(path):
        _truncate(file)


def test_if_all_are_damaged_the_error_says_what_to_do(tmp_path):
    _save(tmp_path, [3, 5])
    _truncate_all(tmp_path / "latest")
    with pytest.raises(DamagedError, match="none of the 2 checkpoints.*another workdir, or delete"):
        restore(tmp_path, _state(0))
    assert _steps(tmp_path, "latest") == [3, 5]  # Nothing was moved or deleted.


def test_incomplete_folders_are_ignored_and_removed(tmp_path):
    _save(tmp_path, [3])
    incomplete = tmp_path / "latest/5.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "latest/3", incomplete)
    _truncate_all(incomplete)
    _assert_equal(restore(tmp_path, _state(0)), 3)
    _save(tmp_path, [5])
    assert _steps(tmp_path, "latest") == [3, 5]


def test_is_finite():
    assert is_finite({"a": jnp.ones(3), "b": jnp.arange(3), "c": jnp.ones(2, jnp.bfloat16)})
    assert is_finite({})
    for bad in (jnp.nan, jnp.inf):
        assert not is_finite({"a": jnp.ones(3), "b": jnp.asarray([1, bad], jnp.bfloat16)})


def test_a_run_with_a_damaged_checkpoint_ends_like_an_uninterrupted_one(tmp_path, capsys):

    def rising(params):
        return {"ndcg@10": -toy_run.evaluate(params)["ndcg@10"]}

    expected = toy_run.run(tmp_path / "b", epochs=3, evaluate_fn=rising)
    toy_run.run(tmp_path / "a", epochs=2, evaluate_fn=rising)
    _truncate_all(tmp_path / "a/checkpoints/best/14")  # the newest and the best
    resumed = toy_run.run(tmp_path / "a", epochs=3, evaluate_fn=rising)
    assert "falling back to the last good checkpoint, step 10" in capsys.readouterr().err
    assert toy_run.digest(resumed.state) == toy_run.digest(expected.state)
    assert resumed.best_value == expected.best_value
    resumed_lines, expected_lines = (
        [line for line in result.history if "val/ndcg@10" in line] for result in (resumed, expected)
    )
    assert resumed_lines == expected_lines


def test_a_lost_best_is_replaced(tmp_path, capsys):
    assert toy_run.run(tmp_path, epochs=2).best_step == 7
    shutil.rmtree(tmp_path / "checkpoints/best/7")
    result = toy_run.run(tmp_path, epochs=2)
    assert "the best checkpoint (step 7) is lost" in capsys.readouterr().err
    assert result.best_step == 14  # Evaluated again, because the run resumes from this step.
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


def test_a_full_disk_is_reported_and_earlier_checkpoints_stay_intact(tmp_path):
    """Simulates a full disk by a limit on file size: both make a write fail half-way."""
    code = _LIMITED.format(folder=os.path.dirname(__file__), workdir=str(tmp_path / "a"))
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "JAX_NUM_CPU_DEVICES": "1"},
        check=False,
    )
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr  # Orbax would log about twenty.
    message = process.stderr.strip().splitlines()[-1]
    assert "could not be written" in message and "the disk is full" in message
    assert "step 7 is intact" in message
    resumed = toy_run.run(tmp_path / "a", epochs=3, width=20_000)
    expected = toy_run.run(tmp_path / "b", epochs=3, width=20_000)
    assert toy_run.digest(resumed.state) == toy_run.digest(expected.state)


def test_a_checksum_does_not_depend_on_the_sharding():
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    expected = zlib.crc32(x.reshape(-1).view(np.uint8))
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    P = PartitionSpec
    for spec in (P(), P("a"), P(("a", "b")), P(("b", "a")), P(None, "a"), P("a", "b")):
        assert _digest(jax.device_put(x, NamedSharding(mesh, spec))) == expected, spec
    assert _digest(jnp.float32(1)) == zlib.crc32(np.float32(1).tobytes())
