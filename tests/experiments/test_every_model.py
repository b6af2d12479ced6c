"""The commands on a small run of every model type."""

import csv
import json

import pyarrow.parquet
import pytest
from in_process import CONFIGS, command, shared_compilations

import rec_jax
from rec_jax.models.registry import MODELS

# {model type: (config, flags that make its run small)}
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
    "--config.train.epochs=6", "--config.train.eval_every_epochs=6.0", "--config.train.micro_rows=16",
    "--config.train.checkpoint_every_steps=0", "--config.model.num_layers=1", "--config.mesh.data=1",
    "--config.eval.bootstrap=0", "--config.eval.baselines=('popularity',)",
)  # fmt: skip


@pytest.fixture(scope="session")
def workdirs(tmp_path_factory):
    """{type: workdir}; each run is trained on its first use."""
    folder = tmp_path_factory.mktemp("every")

    class Workdirs(dict):
        def __missing__(self, model_type):
            config, flags = RUNS[model_type]
            workdir = folder / model_type
            command("train", f"--config={CONFIGS}/{config}.py:smoke", f"--workdir={workdir}", *SMALL, *flags)
            self[model_type] = workdir
            return workdir

    return Workdirs()


def recommended(capsys, workdir, *flags) -> list[list[str]]:
    """The item ids of each list that the command prints."""
    capsys.readouterr()
    command("recommend", f"--workdir={workdir}", *flags)
    lists = capsys.readouterr().out.split("best next items:\n")[1:]
    return [
        [line.split()[3] for line in text.splitlines() if line.split()[1:2] == ["score"]] for text in lists
    ]


def test_every_type_has_a_run():
    assert set(RUNS) == {config.type for config in MODELS}


@pytest.mark.parametrize("model_type", RUNS)
def test_train_evaluate_and_recommend(workdirs, model_type, capsys, tmp_path):
    workdir = workdirs[model_type]
    result = json.loads((workdir / "result.json").read_text())
    popularity, oracle = (
        result["baselines"][name]["unfiltered/ndcg@10"] for name in ("popularity", "oracle")
    )
    assert popularity < result["test"]["unfiltered/ndcg@10"] < oracle
    command("evaluate", f"--workdir={workdir}")
    scores = json.loads((workdir / "evaluation_test.json").read_text())
    assert scores["model"] == result["test"] and scores["popularity"] == result["baselines"]["popularity"]

    one, two = recommended(capsys, workdir, "--user=u7", "--user=u8", "--k=20")
    history = ["i1", "i2", "i3"]
    (after,) = recommended(capsys, workdir, "--history=i1,i2,i3", "--times=10,20,30")
    assert len(one) == len(two) == 20 and one != two
    assert len(after) == 10 and not set(history) & set(after)
    with shared_compilations():
        recommendations = rec_jax.load(workdir).recommend(history, times=[10, 20, 30])
    assert [x.item_id for x in recommendations] == after

    path = tmp_path / "lists.parquet"
    command("recommend", f"--workdir={workdir}", "--users=all", f"--output={path}", "--k=20")
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert len({row["user"] for row in rows}) == 300
    assert [row["item"] for row in rows if row["user"] == "u7"] == one
    assert [row["item"] for row in rows if row["user"] == "u8"] == two


def test_csv_and_parquet_lists_are_equal(workdirs, tmp_path):
    flags = (f"--workdir={workdirs['sasrec']}", "--users=all", "--k=20")
    for suffix in ("parquet", "csv"):
        command("recommend", *flags, f"--output={tmp_path / 'lists'}.{suffix}")
        assert not list(tmp_path.glob("*.partial"))
    rows = pyarrow.parquet.read_table(tmp_path / "lists.parquet").to_pylist()
    with open(tmp_path / "lists.csv", newline="") as file:
        assert [(x["user"], x["item"], int(x["rank"])) for x in csv.DictReader(file)] == [
            (x["user"], x["item"], x["rank"]) for x in rows
        ]


# Attention, a recurrence and a beam search; tests/compress/test_all_models.py quantizes every model type.
@pytest.mark.parametrize("model_type", ["sasrec", "lru", "tiger"])
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
    with shared_compilations():
        assert len(rec_jax.load(tmp_path / "int8").recommend(user="u7", k=5)) == 5


def test_comparisons_and_ensembles(workdirs, capsys):
    runs = {name: str(workdirs[name]) for name in ("sasrec", "gru4rec", "tiger")}
    command("evaluate", f"--workdir={','.join(runs.values())}")
    scores = json.loads((workdirs["sasrec"] / "comparison_test.json").read_text())
    assert set(scores) == {"ensemble", "popularity", "oracle", *runs.values()}
    best = max([*runs.values(), "ensemble"], key=lambda name: scores[name]["ndcg@10"])
    over = scores[best]["over"]
    assert set(over) == {"ensemble", *runs.values()} - {best}
    for name, compared in over.items():
        difference = scores[best]["ndcg@10"] - scores[name]["ndcg@10"]
        assert compared["difference"] == pytest.approx(difference) and 0 < compared["p"] <= 1
    for name, path in runs.items():
        result = json.loads((workdirs[name] / "result.json").read_text())
        assert scores[path]["ndcg@10"] == result["test"]["ndcg@10"]
    assert (workdirs["sasrec"] / "comparison_test.png").stat().st_size > 10_000
    assert f"not in the ensemble: {runs['tiger']}" in capsys.readouterr().out
    command("recommend", f"--workdir={runs['sasrec']},{runs['gru4rec']}", "--user=u7")
    assert "the 10 best next items" in capsys.readouterr().out
    with pytest.raises(ValueError, match="type='tiger'.*cannot be averaged with others: leave it out"):
        command("recommend", f"--workdir={runs['sasrec']},{runs['tiger']}", "--user=u7")


def test_a_finished_run_is_evaluated_with_other_settings(workdirs):
    workdir = workdirs["gru4rec"]
    command(
        "evaluate", f"--workdir={workdir}", "--config.eval.sampled_negatives=5", "--config.eval.ks=(10, 40)"
    )
    scores = json.loads((workdir / "evaluation_test.json").read_text())["model"]
    assert "sampled5/hr@10" in scores and "hr@40" in scores and "hr@20" not in scores
