"""Problems read from files: this package's own arrays, and the files of other solvers by way of HiGHS."""

from __future__ import annotations

import codecs
import gzip
import io
import math
import re
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from .problem import OPERANDS
from .validation import indefinite, make_problem

MODELS = {".mps": ".mps", ".qps": ".mps", ".lp": ".lp"}
"""The suffix by which HiGHS knows the format of a file."""
OLDEST = (1, 14)
"""The first HiGHS that reads either triangle of a Hessian; those before silently drop one."""
LARGEST = 8 * 2**30
"""Bytes that a file may take unpacked by default, and its matrices as dense ones."""
MINIMIZE = ("MIN", "MINIMIZE", "MINIMISE", "MINIMUM")
MAXIMIZE = ("MAX", "MAXIMIZE", "MAXIMISE", "MAXIMUM")
"""The words for the sense of the objective, in any case: of OBJSENSE in an MPS file, and the first of an LP file."""


class FileProblem(NamedTuple):
    """A problem, or a batch of them, as a file states it."""

    operands: dict[str, Any]
    """The operands of `qpdiff.solve_qp` by name, which minimises; the matrices of an MPS or LP file are sparse."""
    sense: float = 1.0
    """−1 where the file maximises: the operands are those of its negative."""
    offset: float = 0.0
    """The constant term of the objective."""

    def objective(self, minimum):
        """Return the objective that the file states, of the `objective` of a solution."""
        return self.sense * minimum + self.offset

    def dense_operands(self, limit: int = LARGEST) -> dict[str, np.ndarray]:
        """Return the operands with dense matrices.

        Raises
        ------
        ValueError
            For matrices that take more bytes than the limit.
        """
        size = sum(8 * math.prod(value.shape) for value in self.operands.values() if sp.issparse(value))
        if size > limit:
            raise ValueError(
                f"the dense matrices of the problem take {size / 2**30:.1f} GiB; expected at most "
                f"{limit / 2**30:.3g} GiB"
            )
        return {name: value.toarray() if sp.issparse(value) else value for name, value in self.operands.items()}


def read_problem(file, limit: int = LARGEST) -> FileProblem:
    """Read the problem in a file.

    ===========================  =======================================================================================
    ``.npz``                     arrays Q, q and any of G, h, A, b, lb, ub, with or without batch axes
    ``.mps``, ``.qps``, ``.lp``  one linear or quadratic program in the MPS format with its extensions for a quadratic
                                 objective (QUADOBJ, QMATRIX), or in the LP format; also compressed, with ``.gz`` added
    ===========================  =======================================================================================

    Parameters
    ----------
    file : str or path
    limit : int
        Bytes that the file may take unpacked; 8 GiB by default.

    Returns
    -------
    FileProblem
        Of an MPS or LP file the variables and rows are in the order of the file, and the matrices those of
        scipy.sparse. Rows with equal sides are those of A; those with an upper side, and then those with a lower side,
        with the opposite sign, are those of G.

    Raises
    ------
    OSError
        For a file that cannot be opened.
    ValueError
        For a file of another kind, or one that cannot be read, naming it; for a sense of the objective that is not
        known; for a quadratic objective that is maximised and not concave; for integer variables; and for a file that
        is larger than the limit unpacked.
    ImportError
        For an MPS or LP file without HiGHS, naming the extra to install.

    References
    ----------
    .. [1] I. Maros, C. Mészáros, "A repository of convex quadratic programming problems", Optimization Methods and
       Software 11-12, 1999: the QPS format.
    .. [2] Q. Huangfu, J. A. J. Hall, "Parallelizing the dual revised simplex method", Mathematical Programming
       Computation 10, 2018: HiGHS, which reads MPS and LP files.

    Examples
    --------
    The example of [1]_: minimise 4 + 1.5x − 2y + ½(8x² + 4xy + 10y²) subject to 2x + y ≥ 2, −x + 2y ≤ 6, 0 ≤ x ≤ 20 and
    y ≥ 0.

    >>> import pathlib, tempfile
    >>> import qpdiff
    >>> text = '''NAME          QPTEST
    ... ROWS
    ...  N  obj
    ...  G  r1
    ...  L  r2
    ... COLUMNS
    ...     c1        obj       1.5            r1        2.0
    ...     c1        r2        -1.0
    ...     c2        obj       -2.0           r1        1.0
    ...     c2        r2        2.0
    ... RHS
    ...     rhs       obj       -4.0           r1        2.0
    ...     rhs       r2        6.0
    ... BOUNDS
    ...  UP bound     c1        20.0
    ... QUADOBJ
    ...     c1        c1        8.0
    ...     c1        c2        2.0
    ...     c2        c2        10.0
    ... ENDATA
    ... '''
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder) / "qptest.qps"
    ...     _ = file.write_text(text)
    ...     problem = read_problem(file)
    >>> problem.operands["G"].toarray().tolist(), problem.operands["h"].tolist()
    ([[-1.0, 2.0], [-2.0, -1.0]], [6.0, -2.0])
    >>> solution = qpdiff.solve_qp(**problem.operands)
    >>> round(float(problem.objective(solution.objective)), 6)
    8.371875
    """
    file = Path(file)
    compressed = file.suffix.lower() == ".gz"
    kind = Path(file.stem if compressed else file.name).suffix.lower()
    if kind == ".npz" and not compressed:
        return _read_arrays(file, limit)
    if kind not in MODELS:
        raise ValueError(f"{file} does not end in .npz, {', '.join(MODELS)} or one of these three with .gz")
    return _read_model(file, MODELS[kind], gzip.open if compressed else open, limit)


def _read_arrays(file: Path, limit: int) -> FileProblem:
    """Return the operands in a NumPy archive, other arrays ignored."""
    with file.open("rb") as source:
        try:
            archive = zipfile.ZipFile(source)
            members = {name: archive.getinfo(f"{name}.npy") for name in OPERANDS if f"{name}.npy" in archive.namelist()}
        except Exception as error:  # zipfile raises a kind of its own for each part that is damaged
            raise ValueError(f"{file} is not a NumPy archive, or is damaged: {error}") from error
        _check_size(file, sum(member.file_size for member in members.values()), limit)
        operands = {name: _read_array(file, archive, name, member) for name, member in members.items()}
    for name in ("Q", "q"):
        if name not in operands:
            raise ValueError(f"{file} has no array {name}")
    return FileProblem(operands)


def _read_array(file: Path, archive: zipfile.ZipFile, name: str, member: zipfile.ZipInfo) -> np.ndarray:
    """Return one array of an archive, read-only; its header is compared with its size before memory is taken."""
    try:
        data = archive.read(member)  # never more than the size that the archive states
        stream = io.BytesIO(data)
        major = np.lib.format.read_magic(stream)[0]
        header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = header(stream)
        size = len(data) - stream.tell()
        if not dtype.hasobject and math.prod(shape) * dtype.itemsize != size:
            raise ValueError(f"its shape {shape} does not fit its {size} bytes")
    except Exception as error:  # zipfile, its decompressors and NumPy raise kinds of their own for damaged bytes
        raise ValueError(f"{file}: the array {name} is damaged: {error or type(error).__name__}") from error
    if dtype.hasobject:
        raise ValueError(f"{file}: {name} holds Python objects; expected real numbers")
    return np.ndarray(shape, dtype, data, stream.tell(), order="F" if by_columns else "C")


def _check_size(file: Path, size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"{file} takes more than {limit / 2**30:.3g} GiB unpacked, the limit on its size")


def _read_at_most(source, size: int) -> bytes:
    """Return the bytes of a stream up to a size, without taking memory for more than there are."""
    stream = io.BytesIO()
    while stream.tell() < size and (piece := source.read(min(2**20, size - stream.tell()))):
        stream.write(piece)
    return stream.getvalue()


def _read_model(file: Path, suffix: str, opened, limit: int) -> FileProblem:
    try:
        import highspy
    except ImportError as error:
        raise ImportError(f"reading {file} needs HiGHS: pip install 'qpdiff[io]'") from error
    model = _model(highspy, file, suffix, opened, limit)
    lp, hessian = model.lp_, model.hessian_
    discrete = [j for j, kind in enumerate(lp.integrality_) if kind != highspy.HighsVarType.kContinuous]
    if discrete:
        raise ValueError(
            f"{file} has integer or semicontinuous variables, {len(discrete)} in all, {lp.col_names_[discrete[0]]} the "
            "first; expected continuous ones"
        )
    if not lp.num_col_:
        raise ValueError(f"{file} has no variables")
    n, lower, upper = lp.num_col_, np.asarray(lp.row_lower_), np.asarray(lp.row_upper_)
    equal = lower == upper
    above, below = ~equal & (upper < np.inf), ~equal & (lower > -np.inf)
    sense = -1.0 if lp.sense_ == highspy.ObjSense.kMaximize else 1.0
    operands = {"Q": sense * _hessian(highspy, hessian, n), "q": sense * np.asarray(lp.col_cost_)}
    if sense < 0 and hessian.dim_:
        _check_concave(file, operands, limit)
    matrix = lp.a_matrix_
    kind = sp.csc_array if matrix.format_ == highspy.MatrixFormat.kColwise else sp.csr_array
    K = sp.csr_array(kind((matrix.value_, matrix.index_, matrix.start_), (lp.num_row_, n)))
    if np.any(equal):
        operands |= {"A": K[equal], "b": upper[equal]}
    if np.any(above) or np.any(below):
        operands["G"] = sp.vstack([K[above], -K[below]], format="csr")
        operands["h"] = np.concat([upper[above], -lower[below]])
    for name, bound in (("lb", np.asarray(lp.col_lower_)), ("ub", np.asarray(lp.col_upper_))):
        if np.any(np.isfinite(bound)):
            operands[name] = bound
    return FileProblem(operands, sense, lp.offset_)


def _model(highspy, file: Path, suffix: str, opened, limit: int):
    """Let HiGHS read a file; its errors and warnings become ours."""
    highs, messages = _silent(highspy), []
    if tuple(int(number) for number in highs.version().split(".")[:2]) < OLDEST:
        raise ImportError(f"reading {file} needs HiGHS 1.14 or newer: pip install 'qpdiff[io]'")
    highs.cbLogging.subscribe(lambda event: messages.append((event.data_out.log_type, event.message.strip())))
    with tempfile.TemporaryDirectory() as folder:
        named = Path(folder) / f"model{suffix}"  # HiGHS knows no .qps, and in some builds no compression
        try:
            with opened(file, "rb") as source:
                text = _read_at_most(source, limit + 1)
            _check_size(file, len(text), limit)
            with named.open("wb") as copy:
                (_copy_mps if suffix == ".mps" else _copy_lp)(file, io.BytesIO(text), copy)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{file} cannot be decompressed: {error}") from error
        status = highs.readModel(str(named))
    errors, notes = (
        "; ".join(text.removeprefix(f"{label}:").strip() for found, text in messages if found == kind)
        for kind, label in ((highspy.HighsLogType.kError, "ERROR"), (highspy.HighsLogType.kWarning, "WARNING"))
    )
    if status == highspy.HighsStatus.kError:
        reason = errors.replace(str(named), str(file)) or "it does not say why"
        raise ValueError(f"HiGHS cannot read {file}: {reason}")
    if notes:
        message = f"HiGHS reads {file} with a warning: {notes.replace(str(named), str(file))}"
        warnings.warn(printable(message), stacklevel=4)
    return highs.getModel()


def printable(text) -> str:
    """Return a text with its control characters as escapes, on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def _silent(highspy):
    """Return a HiGHS that prints nothing.

    Its banner goes to standard output while it is made, with the callbacks, and by then it has to know.
    """

    class Silent(highspy.Highs):
        def enableCallbacks(self):
            self.setOptionValue("log_to_console", False)
            super().enableCallbacks()

    return Silent()


def _copy_mps(file: Path, source, copy) -> None:
    """Copy an MPS file with its sections before ROWS in the one spelling that both of HiGHS's parsers understand.

    They skip there what they do not know without a word, and so would minimise after ``OBJSENSE MAXIMIZE``. A file
    without ROWS is copied as it is, for HiGHS to refuse.
    """
    header, senses, unknown, section = [], [], [], ""
    for line in source:
        header.append(line)
        words = line.removeprefix(codecs.BOM_UTF8).decode(errors="replace").split()
        if not words or words[0].startswith("*"):
            continue
        first = words[0].upper()
        if first == "ROWS" and len(words) == 1:
            break
        if first == "NAME":
            section = first
        elif first.startswith("OBJSENSE"):  # OBJSENSEMAX, which lp_solve has, too
            section, given = "OBJSENSE", [words[0][len("OBJSENSE") :], *words[1:]]
            senses.append(" ".join(given).strip())
        elif section == "OBJSENSE" and (line[:1].isspace() or not senses[-1]):
            senses[-1] = f"{senses[-1]} {' '.join(words)}".strip()
        else:
            section = ""
            unknown.append(" ".join(words))
    else:
        copy.writelines(header)
        return
    if unknown:
        raise ValueError(
            f"{file} has {unknown[0]!r} before ROWS; expected NAME, OBJSENSE or a comment that begins with *"
        )
    maximize = [_maximizes(f"{file} has an OBJSENSE that is", sense) for sense in senses]
    if len(maximize) > 1:
        raise ValueError(f"{file} has {len(maximize)} sections OBJSENSE; expected at most one")
    copy.write(b"NAME\nOBJSENSE\n  MAX\nROWS\n" if any(maximize) else b"NAME\nROWS\n")
    for line in source:
        if line.upper().split(maxsplit=1)[:1] == [b"OBJSENSE"]:
            raise ValueError(f"{file} has OBJSENSE after ROWS; expected it before")
        if not line.isspace():  # at which the parser of fixed columns hangs
            copy.write(line)


_LP_START = re.compile(rb"((?:\s|\\[^\n]*|/\*.*?\*/)*)(\S*)", re.DOTALL)
"""Blanks and comments, and the first word."""


def _copy_lp(file: Path, source, copy) -> None:
    """Copy an LP file, whose first word is the sense: HiGHS before 1.16 drops the cost after one it does not know."""
    text = source.read().removeprefix(codecs.BOM_UTF8)
    start = next(_LP_START.finditer(text))
    maximize = _maximizes(f"{file} begins with", start[2].decode(errors="replace"))
    copy.write(start[1].count(b"\n") * b"\n")  # for the numbers of lines in messages
    copy.write(b"max" if maximize else b"min")
    copy.write(text[start.end() :])


def _maximizes(what: str, sense: str) -> bool:
    """Return whether a word for the sense, in any case, is one for maximisation."""
    if sense.upper() not in MINIMIZE + MAXIMIZE:
        raise ValueError(f"{what} {sense!r}; expected one of {', '.join(MINIMIZE + MAXIMIZE)}")
    return sense.upper() in MAXIMIZE


def _check_concave(file: Path, operands: dict[str, Any], limit: int) -> None:
    """Refuse an objective that is maximised and not concave; the operands are those of its negative.

    One that is too large as a dense matrix is left to the solver to refuse.
    """
    if 8 * math.prod(operands["Q"].shape) > limit:
        return
    problem = make_problem(dict.fromkeys(OPERANDS) | operands | {"Q": operands["Q"].toarray()})
    with problem.backend.no_grad():
        if np.any(indefinite(problem)):
            raise ValueError(
                f"{file} maximises a quadratic objective that is not concave, so the problem is not convex; expected a "
                "negative semidefinite matrix where a file maximises"
            )


def _hessian(highspy, hessian, n: int) -> sp.csr_array:
    """Return the matrix Q of ½ xᵀQx, of which HiGHS keeps the lower triangle."""
    if not hessian.dim_:
        return sp.csr_array((n, n))
    starts = np.append(hessian.start_, [hessian.start_[-1]] * (n - hessian.dim_))
    half = sp.csc_array((hessian.value_, hessian.index_, starts), (n, n))
    if hessian.format_ == highspy.HessianFormat.kTriangular:
        half = half + sp.tril(half, -1).T
    half = sp.csr_array(half)
    half.eliminate_zeros()
    return half
