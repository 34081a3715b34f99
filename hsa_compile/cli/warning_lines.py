"""Warnings on the command line: a line each, but one for all the untuned problems of a model."""

import sys

import click

from hsa_compile.errors import DistantWarning, UntunedWarning

_OF_A_MODEL = ("eval", "generate", "profile", "train")

_advised: set[str] = set()


def show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Takes the place of `warnings.showwarning`; a progress bar on the terminal moves out of the way."""
    text = str(message)
    advice = _advice() if issubclass(category, UntunedWarning) else None
    if advice:
        # Lengths of a model change with each prompt: that the nearest schedule is far away calls for nothing.
        if advice in _advised or issubclass(category, DistantWarning):
            return
        _advised.add(advice)
        text = f"{text.partition(';')[0]}; {advice}"
    import tqdm

    tqdm.tqdm.write(f"warning: {text}", file=sys.stderr)


def _advice() -> str | None:
    """A model asks for many problems: one command tunes them all, where each would name its own."""
    context = click.get_current_context(silent=True)  # none in threads that a command started
    if context is None or context.info_name not in _OF_A_MODEL:
        return None
    if context.info_name == "train":
        return "with --tune, train first tunes what it needs"
    dtype = context.params["dtype"]
    flags = f" --dtype {dtype}" if dtype else ""
    return f"tune all that this model needs with: hsa-compile tune --preset {context.params['name']}{flags}"
