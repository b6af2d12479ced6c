"""The commands in this process, which spares each the start of one: as `python -m experiments.NAME`."""

import importlib
import pathlib
import sys
import warnings
from unittest import mock

from absl import flags

FLAGS = flags.FLAGS
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def command(name: str, *args: str) -> None:
    """Runs experiments.NAME with these flags.

    Commands define the same flags: those of the one before are taken away, and its module is imported anew.
    """
    for module, defined in list(FLAGS.flags_by_module_dict().items()):
        for flag in list(defined):
            is_of_command = module.startswith("experiments.") and module != "experiments.launch"
            if (is_of_command or flag.name.startswith("config")) and flag.name in FLAGS:
                delattr(FLAGS, flag.name)
    sys.modules.pop(f"experiments.{name}", None)
    argv = [name, *args]
    with mock.patch.object(sys, "argv", argv), warnings.catch_warnings():  # ml_collections looks at argv
        warnings.filterwarnings("ignore", message="the load_module", category=DeprecationWarning)
        module = importlib.import_module(f"experiments.{name}")
        if hasattr(module, "_define_config"):
            module._CONFIG = module._define_config()
        FLAGS.unparse_flags()
        FLAGS(argv)
        module.main()
