"""Style rules of the code base that can be checked automatically."""

import ast
import configparser
import dataclasses
import functools
import importlib.metadata
import pathlib
import re
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from rec_jax.run_config import ExperimentConfig

ROOT = pathlib.Path(__file__).parents[1]
# A module may import the modules of its own line and of the lines above.
ORDER = """
hashing tree config report workdir
mesh processes
data
tables
nn
objectives
models
versions
train
eval
compress
trained
serve
run_config
training
experiment
recipes
experiments configs
"""
LEVELS = {name: level for level, line in enumerate(ORDER.split("\n")) for name in line.split()}


@functools.cache
def modules() -> list[tuple[pathlib.Path, ast.Module]]:
    paths = [path for name in ("rec_jax", "experiments", "configs") for path in (ROOT / name).rglob("*.py")]
    return [(path, ast.parse(path.read_text())) for path in sorted(paths)]


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


def test_imports_follow_the_order():
    for path, tree in modules():
        part = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if part == "__init__":  # of the package: `rec_jax.load` imports inside the function
            continue
        for name in imports(tree):
            imported = part_of(name)
            assert part in LEVELS and (imported in LEVELS or not name.startswith("rec_jax.")), (path, name)
            if imported in LEVELS and imported != part:
                assert LEVELS[imported] < LEVELS[part] or {part, imported} <= {"experiments", "configs"}, (
                    f"{path.relative_to(ROOT)} imports {name}"
                )
                assert not (part == "nn" and imported == "config"), path


def test_files_and_functions_are_short():
    for path, tree in modules():
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 100, (path, node.name)
                if node.name == "__init__":
                    assert len(node.args.args) + len(node.args.kwonlyargs) <= 1 + 8, path


def test_nnx_is_not_used_in_the_training_step():
    for path, tree in modules():
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not used & {"Optimizer", "cached_partial"}, path
        assert "nnx.jit" not in path.read_text(), path


def test_configs_are_read_without_a_default():
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "get" and isinstance(node.value, ast.Name):
                assert node.value.id not in ("cfg", "config"), f"{path}:{node.lineno}"


def test_no_module_is_named_utils_or_common():
    names = {path.name for path, _ in modules()}
    assert "utils.py" not in names
    assert [path for path, _ in modules() if path.name == "common.py"] == [ROOT / "configs/common.py"]


def test_no_config_field_has_the_name_of_a_configdict_method():
    def names(config):
        for field in dataclasses.fields(config):
            yield field.name
            if dataclasses.is_dataclass(getattr(config, field.name)):
                yield from names(getattr(config, field.name))

    assert not [name for name in names(ExperimentConfig()) if hasattr(ConfigDict, name)]


@pytest.mark.parametrize("command", ["check", "format --check --diff"])
def test_ruff(command):
    run = subprocess.run(
        [sys.executable, "-m", "ruff", *command.split(), "--no-cache", "."],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if run.returncode:
        pytest.fail(run.stdout, pytrace=False)


def _setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_dependencies_are_what_the_code_imports():
    def normal(name):
        return name.replace("_", "-").lower()

    lines = _setup()["options"]["install_requires"].split("\n")
    required = {normal(re.match(r"[\w-]+", line)[0]) for line in lines if line and line[0] != "#"}
    packages = importlib.metadata.packages_distributions()
    imported = {name.split(".")[0] for _, tree in modules() for name in imports(tree)}
    used = {"importlib-resources"}  # by tensorflow-datasets
    for name in imported - sys.stdlib_module_names - {"rec_jax", "experiments", "configs"}:
        candidates = {normal(package) for package in packages[name]}
        assert candidates & required, f"setup.cfg does not list {candidates}, which the code imports"
        used |= candidates
    assert not required - used, f"nothing imports {required - used}"


def test_citation_names_the_version():
    version = _setup()["metadata"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
