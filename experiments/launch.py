"""Start of every command: its common flags, devices, processes and error messages."""

import contextlib
import itertools
import os
import re
import sys
import traceback

import jax
from absl import app, flags, logging
from ml_collections.config_flags import config_flags

from rec_jax.mesh import use_cpu_cores

_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "For a run of several processes: HOST:PORT of process 0, or 'auto' on a cluster that JAX detects.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")


def launch(main) -> None:
    """Runs `main()` with all CPU cores as devices, only warnings in the log, and errors as one line.

    A mistake of the user raises a ValueError that says what to do. It is shown without a traceback unless
    REC_JAX_TRACEBACK is set. If there are several processes, only the first prints to stdout.
    """

    def guarded(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}: give options as --name=value")
        logging.set_verbosity(logging.WARNING)
        use_cpu_cores()
        from rec_jax import processes  # slow to import, so not for --help

        try:
            processes.connect(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
            if jax.distributed.is_initialized() and not processes.is_first():
                sys.stdout = open(os.devnull, "w")
            main()
        except (Exception, KeyboardInterrupt) as error:
            is_mistake = isinstance(error, (ValueError, OSError, FloatingPointError))
            text = f"error: {error}" if is_mistake and "REC_JAX_TRACEBACK" not in os.environ else ""
            if jax.distributed.is_initialized():
                # The other processes wait for this one, so it must not wait for them, as JAX would at exit.
                print(text or traceback.format_exc(), file=sys.stderr, flush=True)
                sys.stdout.flush()
                os._exit(1)
            if not text:
                raise
            sys.exit(text)

    app.run(guarded, flags_parser=_parse)


class ConfigParser(config_flags.ConfigFileFlagParser):
    """Loads a config file. A flag such as --config.loss.type=gbce determines the keys of its section, so it
    is applied first, regardless of its position on the command line."""

    def parse(self, path):
        file = path.split(":")[0]
        if not os.path.exists(file):
            sys.exit(f"error: --config={path}: there is no file {file}; the configs are in configs/")
        try:
            config = super().parse(path)
        except ValueError as error:
            if error.__context__ is None or "REC_JAX_TRACEBACK" in os.environ:
                raise
            sys.exit(f"error: --config={path}: {error.__context__}")
        return switch_types(config)


def switch_types(config):
    """Returns the config, with each section switched to the type that the command line names for it."""
    from rec_jax.config import switch_type
    from rec_jax.run_config import ExperimentConfig

    for flag, after in itertools.pairwise([*sys.argv, ""]):
        if match := re.fullmatch(r"--?config\.(\w+)\.type(?:=(.*))?", flag):
            with config.unlocked():
                switch_type(ExperimentConfig, config, match[1], after if match[2] is None else match[2])
    return config


def define_config(help_string: str, flag_values=flags.FLAGS):
    """Defines --config=FILE[:variant], and a flag for every key of that config."""
    holder = config_flags.DEFINE_config_file("config", None, help_string, flag_values)
    flag_values["config"].parser = ConfigParser("config")
    return holder


def _parse(argv):
    """Parses the flags; an unknown config key ends the command with one line, like other mistakes."""
    with known_keys(argv):
        return app.parse_flags_with_usage(argv)


@contextlib.contextmanager
def known_keys(argv=None):
    """Exits with one line if a flag names a key that the config does not have."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        if "REC_JAX_TRACEBACK" in os.environ:
            raise
        text = (
            str(error).replace("\\n", ": ").replace("\\'", "").strip("'\"")
        )  # ml_collections quotes it twice
        text = text.replace("\n", ": ").replace("'", "")
        sys.exit(f"error: unknown key of the config, {text}{_models_with(argv or sys.argv, text)}")


def _models_with(argv, text: str) -> str:
    """Returns a hint that names the models that have the key, if models other than the config's have it."""
    from dataclasses import fields

    from rec_jax.models.registry import MODELS

    key = re.search(r"\w+", text)[0]
    names = {arg.split("=")[0] for arg in argv if re.match(rf"--config\..*\.{key}(=|$)", arg)}
    types = [config.type for config in MODELS if key in {field.name for field in fields(config)}]
    if names != {f"--config.model.{key}"} or not types:
        return ""
    return f": model.{key} is a key of the models {', '.join(types)}, not of this config's model"
