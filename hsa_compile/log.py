"""The logger of the package, which is silent unless `HSA_COMPILE_LOG` asks it to speak."""

import logging
import warnings

from hsa_compile.errors import HSACompileWarning
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
        warnings.warn(f"HSA_COMPILE_LOG = {level!r} is not one of {allowed}", HSACompileWarning, stacklevel=3)
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("hsa-compile %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
