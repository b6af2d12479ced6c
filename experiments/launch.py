"""What every entry point does first and last."""

import os
import sys

from absl import app, logging

from rec_jax.mesh import use_cpu_cores


def launch(main) -> None:
    """Runs `main(argv)` with all CPU cores, little chatter, and errors as one line.

    A mistake of the user's is a ValueError that says what to do, so it is shown without a traceback,
    unless REC_JAX_TRACEBACK is set.
    """

    def guarded(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}: every option is --name=value")
        logging.set_verbosity(logging.WARNING)
        use_cpu_cores()
        from rec_jax.train.checkpoint import SaveError  # slow to import: after --help

        try:
            main()
        except (ValueError, OSError, FloatingPointError, SaveError) as error:
            if "REC_JAX_TRACEBACK" in os.environ:
                raise
            sys.exit(f"error: {error}")

    app.run(guarded)
