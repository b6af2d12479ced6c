"""Every command of the README, on one small run of every model type."""

import csv
import json

import pyarrow.parquet
import pytest
from in_process import CONFIGS, command

import rec_jax
from rec_jax.models.registry import MODELS

# Of each type the config, and what makes its run small.
RUNS = {
    "sasrec": ("sasrec_ml1m", ()),
    "esasrec": ("esasrec_ml1m", ()),
    "bert4rec": ("bert4rec_ml1m", ()),
    "gru4rec": ("gru4rec_ml1m", ()),
    "hstu": ("hstu_ml1m", ()),
    "lru": ("lru_ml1m", ()),
    "tiger": ("tiger_beauty", ("--config.model.num_beams=8",)),
}
SMALL = (
    "--config.train.epochs=2", "--config.train.eval_every_epochs=2.0", "--config.model.num_layers=1",
    "--config.mesh.data=1", "--config.eval.bootstrap=0", "--config.eval.baselines=('popularity',)",
)  # fmt: skip


@pytest.fixture(scope="session")
def workdirs(tmp_path_factory):
    """{type: workdir}, each trained when it is first asked for."""
    folder = tmp_path_factory.mktemp("every")

    class Workdirs(dict):
        def __missing__(self, model_type):
            config, more = RUNS[model_type]
            self[model_type] = folder / model_type
            command(
                "train",
                f"--config={CONFIGS}/{config}.py:smoke",
                f"--workdir={folder / model_type}",
                *SMALL,
                *more,
            )
            return self[model_type]

    return Workdirs()


def test_there_is_a_run_of_every_type():
    assert set(RUNS) == {config.type for config in MODELS}


@pytest.mark.parametrize("model_type", RUNS)
def test_the_commands(workdirs, model_type, capsys, tmp_path):
    workdir = workdirs[model_type]
    result = json.loads((workdir / "result.json").read_text())
    command("evaluate", f"--workdir={workdir}")
    scores = json.loads((workdir / "evaluation_test.json").read_text())
    assert scores["model"] == result["test"] and scores["popularity"] == result["baselines"]["popularity"]

    def recommended(*flags) -> list[list[str]]:
        """Of each list the item ids."""
        capsys.readouterr()
        command("recommend", f"--workdir={workdir}", *flags)
        lists = capsys.readouterr().out.split("best next items:\n")[1:]
        return [
            [line.split()[3] for line in text.splitlines() if line.split()[1:2] == ["score"]]
            for text in lists
        ]

    one, two = recommended("--user=u7", "--user=u8", "--k=20")
    history = ["i1", "i2", "i3"]
    (after,) = recommended("--history=i1,i2,i3", "--times=10,20,30")
    assert len(one) == len(two) == 20 and one != two
    assert len(after) == 10 and not set(history) & set(after)
    assert [x.item_id for x in rec_jax.load(workdir).recommend(history, times=[10, 20, 30])] == after

    for suffix in ("parquet", "csv"):
        path = tmp_path / f"lists.{suffix}"
        command("recommend", f"--workdir={workdir}", "--users=all", f"--output={path}", "--k=20")
        assert not list(tmp_path.glob("*.partial"))
    rows = pyarrow.parquet.read_table(path.with_suffix(".parquet")).to_pylist()
    with open(path, newline="") as file:
        assert [(x["user"], x["item"], int(x["rank"])) for x in csv.DictReader(file)] == [
            (x["user"], x["item"], x["rank"]) for x in rows
        ]
    assert len({row["user"] for row in rows}) == 300
    assert [row["item"] for row in rows if row["user"] == "u7"] == one
    assert [row["item"] for row in rows if row["user"] == "u8"] == two


@pytest.mark.parametrize("model_type", RUNS)
def test_compress(workdirs, model_type, tmp_path):
    arguments = (
        f"--workdir={workdirs[model_type]}",
        f"--output={tmp_path / 'int8'}",
        "--config.compress.recipe=int8",
    )
    command("compress", *arguments)
    rows = json.loads((tmp_path / "int8/result.json").read_text())
    assert rows["compressed"]["bytes_ratio"] < 0.6
    command("evaluate", f"--workdir={tmp_path / 'int8'}")
    scores = json.loads((tmp_path / "int8/evaluation_test.json").read_text())
    assert scores["model"]["ndcg@10"] == pytest.approx(rows["compressed"]["ndcg@10"])
    assert len(rec_jax.load(tmp_path / "int8").recommend(user="u7", k=5)) == 5


def test_several_as_one(workdirs, capsys):
    names = f"--workdir={workdirs['sasrec']},{workdirs['gru4rec']}"
    command("evaluate", names)
    scores = json.loads((workdirs["sasrec"] / "evaluation_test_ensemble.json").read_text())
    assert set(scores) == {
        "ensemble",
        "popularity",
        "oracle",
        str(workdirs["sasrec"]),
        str(workdirs["gru4rec"]),
    }
    command("recommend", names, "--user=u7")
    assert "the 10 best next items" in capsys.readouterr().out
    with pytest.raises(ValueError, match="type='tiger'.*cannot be averaged with others: leave it out"):
        command("evaluate", f"--workdir={workdirs['sasrec']},{workdirs['tiger']}")


def test_a_finished_run_is_evaluated_with_other_settings(workdirs):
    workdir = workdirs["gru4rec"]
    command(
        "evaluate", f"--workdir={workdir}", "--config.eval.sampled_negatives=5", "--config.eval.ks=(10, 40)"
    )
    scores = json.loads((workdir / "evaluation_test.json").read_text())["model"]
    assert "sampled5/hr@10" in scores and "hr@40" in scores and "hr@20" not in scores
