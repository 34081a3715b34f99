"""What the package says while it runs: a logger that is silent unless `HSA_COMPILE_LOG` asks, and progress bars."""

import logging
import sys
from typing import Any

from hsa_compile.errors import HSACompileWarning, warn_user
from hsa_compile.paths import log_level

LEVELS = ("debug", "info", "warning", "error")

logger = logging.getLogger("hsa_compile")


def set_up_logging() -> None:
    """Sends the package's messages to standard error, from the level on that the user chose.

    A program that sets up logging itself need not set the variable: the logger is `hsa_compile`.
    """
    level = log_level()
    if not level or logger.handlers:
        return
    if level.lower() not in LEVELS:
        allowed = ", ".join(LEVELS)
        warn_user(f"HSA_COMPILE_LOG = {level!r} is not one of {allowed}", HSACompileWarning)
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("hsa-compile %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False


def progress_bar(total: float | None, description: str = "", *, hidden: bool = False, **style: Any) -> Any:
    """Returns a bar of tqdm that fits the terminal. It is a widget in a notebook, and nothing in a pipe.

    Args:
        total: how much there is to do.
        description: what is done, before the bar.
        hidden: whether there is none in any case.
        style: what else tqdm takes; unless it says so, a finished bar is removed.
    """
    from tqdm.auto import tqdm  # a program that shows no bar need not import it

    # None shows it on a terminal only; a notebook without widgets is no terminal, but shows a bar as text.
    disable = hidden or (False if "ipykernel" in sys.modules else None)
    style = {"leave": False, **style}
    return tqdm(total=total, desc=description, disable=disable, dynamic_ncols=True, **style)
