"""Files to write: tried before the solve, and never left half written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def prepared(file: Path, output: Path | None, suffixes: tuple[str, ...]) -> Iterator:
    """Open a temporary file beside `output`; the value is a function that has it written and renamed to `output`.

    The function takes what writes to an open file, and without output does nothing. A place that cannot be written to
    is found before the solve, and a file is never left half written.
    """
    if output is None:
        yield lambda save: None
        return
    if output.suffix.lower() not in suffixes:
        raise ValueError(f"{output} does not end in {' or '.join(suffixes)}")
    output = output.resolve()
    if output.exists() and (not output.is_file() or (file.exists() and output.samefile(file))):
        raise ValueError(f"{output} is {'the problem itself' if output.is_file() else 'no file'}; choose another name")
    temporary = output.with_name(f".qpdiff-{os.getpid()}{output.suffix}")
    try:
        target = temporary.open("xb")
    except OSError as error:
        raise unwritable(output, error) from error

    def write(save) -> None:
        try:
            with target:  # closed here, as a full disk may show only then
                save(target)
            temporary.replace(output)
        except OSError as error:
            raise unwritable(output, error) from error

    try:
        yield write
    finally:
        with suppress(OSError):
            target.close()
        temporary.unlink(missing_ok=True)


def unwritable(output: Path, error: OSError) -> OSError:
    """Return an error that names the file that the user asked for, and not the temporary one."""
    return OSError(f"{output} cannot be written: {error.strerror or error}")
