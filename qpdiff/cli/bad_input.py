"""Bad input as one line on standard error, with exit code 2."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from ..files import printable
from .tables import errors

UsageError: Any = typer.BadParameter.__base__  # of click, or of the copy of it that newer releases of typer have


class OneLineErrors(TyperGroup):
    """The commands, which report arguments and options that typer refuses as one line, as all other bad input."""

    def parse_args(self, ctx, args):
        """Read the options before the command."""
        if not args:
            return super().parse_args(ctx, args)  # prints the help
        with usage_errors_exit():
            return super().parse_args(ctx, args)

    def invoke(self, ctx):
        """Find the command, read its options, and run it."""
        with usage_errors_exit():
            return super().invoke(ctx)


@contextmanager
def usage_errors_exit() -> Iterator[None]:
    """Report an argument or option that typer refuses as one line, with exit code 2."""
    try:
        yield
    except UsageError as error:
        path = error.ctx.command_path if error.ctx else "qpdiff"
        message = " ".join(error.format_message().split()).rstrip(".")
        text = f"{path}: {message}; see {path} --help"
        errors.print(printable(text), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


@contextmanager
def bad_input_exits(file: Path) -> Iterator[None]:
    """Report an error in the user's input as one line, with exit code 2, and each warning as one."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            yield
    except (OSError, ValueError, TypeError, ImportError, MemoryError, OverflowError) as error:
        text = str(error) or type(error).__name__
        text = re.sub(r"^(backend|dtype|tol|rtol|max_iterations|elastic|elastic_quadratic) is ", option_name, text)
        text = re.sub(r"; pass elastic\w*={'bounds'.*", "", text)  # which no option does
        text = text.replace("check=False", "--no-check")
        text = text if str(file) in text else f"{file}: {text}"
        errors.print(printable(text), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Print a warning as one line, without the place in the source that it comes from."""
    errors.print(printable(message), style="yellow", markup=False, highlight=False, soft_wrap=True)


def option_name(found: re.Match) -> str:
    """Return the beginning of a message about an argument of `solve_qp` with the name of the option."""
    return f"--{found[1].replace('_', '-')} is "
