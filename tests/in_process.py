"""Runs commands as `python -m experiments.NAME` does, but in this process: starting one takes seconds."""

import contextlib
import importlib
import os
import pathlib
import sys
import warnings
from unittest import mock

import jax
from absl import app, flags
from jax.experimental.compilation_cache import compilation_cache

from experiments.launch import launch

FLAGS = flags.FLAGS
ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = ROOT / "configs"


def command(name: str, *args: str) -> None:
    """Runs experiments.NAME with these flags; a mistake raises its exception."""
    with mock.patch.dict(os.environ, {"REC_JAX_TRACEBACK": "1"}):
        _run(name, args)


def failure(name: str, *args: str) -> str:
    """Runs experiments.NAME, which must exit with an error; returns the message."""
    try:
        _run(name, args)
    except SystemExit as error:
        assert isinstance(error.code, str), f"the command exited with {error.code!r}"
        return error.code
    raise AssertionError("the command succeeded")


@contextlib.contextmanager
def shared_compilations():
    """Inside, compiled programs are stored on disk, and equal programs are read from there."""
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()  # otherwise JAX keeps the settings of its first compilation
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()


def _run(name: str, args) -> None:
    module_name = f"experiments.{name}"
    _remove_flags()
    sys.modules.pop(module_name, None)
    with (
        mock.patch.object(sys, "argv", [module_name, *args]),  # ml_collections reads it
        mock.patch.object(app, "run", _run_app),
        warnings.catch_warnings(),
        shared_compilations(),
    ):
        warnings.filterwarnings("ignore", message="the load_module", category=DeprecationWarning)
        module = importlib.import_module(module_name)
        if hasattr(module, "_define_config"):
            module._CONFIG = module._define_config()
        with _as_main(module):
            launch(module.main)


@contextlib.contextmanager
def _as_main(module):
    """Makes a module the main one, whose docstring --help shows."""
    main, sys.modules["__main__"] = sys.modules["__main__"], module
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _run_app(main, flags_parser) -> None:
    """Replaces absl's app.run: the same without logging and without an exit at the end."""
    app.define_help_flags()
    FLAGS.unparse_flags()
    main(flags_parser(sys.argv))


def _remove_flags() -> None:
    """Removes the flags of the previous command, because commands define flags with the same names."""
    for module, defined in list(FLAGS.flags_by_module_dict().items()):
        is_command = module.startswith("experiments.") and module != "experiments.launch"
        for flag in list(defined):
            if (is_command or flag.name.startswith("config")) and flag.name in FLAGS:
                delattr(FLAGS, flag.name)
