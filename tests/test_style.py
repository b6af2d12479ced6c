"""Rules of the house that a machine can check."""

import ast
import dataclasses
import pathlib

from ml_collections import ConfigDict

from rec_jax.run_config import ExperimentConfig

ROOT = pathlib.Path(__file__).parents[1]
LEVELS = {
    "tree": 0, "config": 0, "mesh": 0, "processes": 0, "hashing": 0, "workdir": 0, "report": 0,
    "data": 1, "nn": 1, "models": 2, "versions": 2, "train": 3, "eval": 3, "compress": 3, "trained": 4,
    "recommend": 5, "lists": 6, "experiment": 6, "compression": 7, "experiments": 8, "configs": 8,
}  # fmt: skip


def modules():
    for folder in ("rec_jax", "experiments", "configs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text())


def part_of(dotted: str) -> str:
    names = dotted.split(".")
    return names[1] if names[0] == "rec_jax" and len(names) > 1 else names[0]


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if node.module == "rec_jax" else [node.module]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_go_one_way():
    for path, tree in modules():
        here = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name in imports(tree):
            there = part_of(name)
            if there in LEVELS and here in LEVELS and there != here:
                assert LEVELS[there] < LEVELS[here] or {here, there} <= {"experiments", "configs"}, (
                    f"{path.relative_to(ROOT)} imports {name}"
                )
                assert not (here == "nn" and there == "config"), path


def test_nnx_stays_out_of_the_hot_path():
    for path, tree in modules():
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not used & {"Optimizer", "cached_partial"}, path
        assert "nnx.jit" not in path.read_text(), path


def test_no_default_hides_in_a_get_on_a_config():
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "get" and isinstance(node.value, ast.Name):
                assert node.value.id not in ("cfg", "config"), f"{path}:{node.lineno}"


def test_no_drawer_for_odds_and_ends():
    names = {path.name for path, _ in modules()}
    assert "utils.py" not in names
    assert [path for path, _ in modules() if path.name == "common.py"] == [ROOT / "configs/common.py"]


def test_no_field_of_a_config_is_hidden_by_a_method_of_configdict():
    def names(config):
        for field in dataclasses.fields(config):
            yield field.name
            if dataclasses.is_dataclass(getattr(config, field.name)):
                yield from names(getattr(config, field.name))

    assert not [name for name in names(ExperimentConfig()) if hasattr(ConfigDict, name)]
