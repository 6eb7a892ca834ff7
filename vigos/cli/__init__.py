"""The command line: `vigos demo | train | eval | compare | palr | probe | report | study | world | doctor`.

Exit codes: 0 all is well; 1 the run failed, with one line on stderr that says why; 2 the command line or the
configuration is wrong; 143 or 130 `train` was told to stop by SIGTERM or Ctrl-C, and wrote a checkpoint first: the same
command with `--resume auto` goes on as if nothing had happened.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

try:
    import rich  # noqa: F401
    import typer  # noqa: F401
except ImportError as error:  # the base install has torch and triton alone
    from vigos.system.extras import install

    sys.exit(f"error: the vigos command needs {error.name}: {install('train')}")


def main(argv: list[str] | None = None) -> Any:
    """Run the command line; a mistake of the user's ends in one line and a code, not in a traceback."""
    _quiet_libraries()
    _log_to_stderr()
    from vigos.cli.commands import app
    from vigos.cli.options import UsageError
    from vigos.errors import TrainingStopped, end_process
    from vigos.system.screen import print_error

    try:
        return app(argv)
    except UsageError as error:
        print_error(error)
        sys.exit(2)
    except (ValueError, OSError, TrainingStopped) as error:  # our own checks; files and models that are not there
        print_error(error)
        end_process(1)


class _Lines(logging.Handler):
    """Print log records as lines on stderr, whatever stderr is by then; foreign text in them obeys no terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        from vigos.system.text import printable

        mark = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        print(f"{mark}{printable(record.getMessage())}", file=sys.stderr, flush=True)


def _log_to_stderr() -> None:
    """Show what vigos logs: everything on the leader rank, warnings on the others."""
    logger = logging.getLogger("vigos")
    if not any(isinstance(handler, _Lines) for handler in logger.handlers):
        logger.addHandler(_Lines())
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


def _quiet_libraries() -> None:
    """Leave the screen to us: no bars of transformers where nobody watches, no notes meant for its developers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
