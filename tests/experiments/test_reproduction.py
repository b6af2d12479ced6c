"""Configs reach the published numbers that they quote; minutes each: `pytest -m reproduction`."""

import json

import pytest
from test_end_to_end import run

# HR@10 and NDCG@10 that each config is compared with: test part, seen items filtered.
PUBLISHED = {
    "sasrec_ml1m": (0.305, 0.178),
    "gsasrec_ml1m": (0.298, 0.171),
    "sasrec_bce_ml1m": (0.239, 0.126),
    "sasrec_beauty": (0.090, 0.052),
}


@pytest.mark.reproduction
@pytest.mark.parametrize("name", PUBLISHED)
def test_config_reaches_the_published_numbers(name, real_data, tmp_path):
    run("experiments.train", f"--config=configs/{name}.py", f"--workdir={tmp_path}", timeout=7200)
    test = json.loads((tmp_path / "result.json").read_text())["test"]
    hit_rate, ndcg = PUBLISHED[name]
    assert test["filtered/hr@10"] >= hit_rate and test["filtered/ndcg@10"] >= ndcg
