"""Plant faults in the method and the derivative of the array engine, and list those that no test notices.

Cosmic Ray changes one number, comparison or operator at a time in a copy of the package that is installed; tests of the
method that take less than a minute run on each. A sample drawn with a fixed seed is tried, until the time is over.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import TestOutcome

import qpdiff

FILES = [
    "engines/parameters.py",
    *(f"engines/array/{name}.py" for name in (
        "batch", "central_path", "derivative", "dual_space", "equilibration", "kkt", "loop", "reduced_forms", "start",
        "state", "status", "step",
    )),
]  # fmt: skip
OPERATORS = re.compile(
    r"core/(NumberReplacer|ReplaceComparisonOperator_(Lt_GtE|GtE_Lt|Gt_LtE|LtE_Gt|Eq_NotEq|NotEq_Eq)"
    r"|ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|Pow_Mul|BitAnd_BitOr|BitOr_BitAnd)"
    r"|ReplaceUnaryOperator_Delete_\w+|ReplaceAndWithOr|ReplaceOrWithAnd|AddNot)"
)
"""Not > for ≥ and the like, which differ for no number that is rounded."""
TESTS = [
    "engines/test_reduced_forms.py", "engines/test_equilibration.py", "engines/test_status.py",
    "derivative/test_kkt_system.py", "engines/test_warm_start.py", "engines/test_certificates.py",
    "engines/test_solver.py", "derivative/test_differentiation.py", "derivative/test_smoothing.py",
    "engines/test_degenerate.py", "engines/test_units.py",
]  # fmt: skip
"""The quick ones first: a fault that one of them notices costs no more time."""
CHOSEN = "not compiled and not jax and not torch and not strict and not cupy and not thousand and not hundred"


def annotations(path: Path) -> set[int]:
    """Return the lines of a file on which annotations of types stand, where | is no operation of the method."""
    places = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.args, *node.args.kwonlyargs]
            places += [node.returns, *(argument.annotation for argument in arguments)]
        elif isinstance(node, ast.AnnAssign) and node.value is None:
            places.append(node.annotation)
    return {line for place in places if place for line in range(place.lineno, place.end_lineno + 1)}


def find_mutations(package: Path, folder: Path):
    """Return all changes of the operators that count, in the order of the files."""
    paths = [package / name for name in FILES]
    with use_db(str(folder / "session.sqlite")) as db:
        init(paths, db, {})
        found = [mutation for item in db.pending_work_items for mutation in item.mutations]
    typed = {path: annotations(path) for path in paths}
    chosen = (m for m in found if OPERATORS.fullmatch(m.operator_name) and m.start_pos[0] not in typed[m.module_path])
    return sorted(chosen, key=lambda m: (str(m.module_path), m.start_pos, m.operator_name, m.occurrence))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=150, help="how many faults to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30.0, help="when to stop, after the fault that is being tried")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="qpdiff-mutants-") as temporary:
        folder = Path(temporary)
        package = Path(shutil.copytree(
            Path(qpdiff.__file__).parent, folder / "qpdiff", ignore=shutil.ignore_patterns("__pycache__")
        ))  # fmt: skip
        os.environ["PYTHONPATH"] = temporary
        files = [str(Path(__file__).parent / name) for name in TESTS]
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", CHOSEN, *files]
        begin = time.monotonic()
        subprocess.run(command, check=True)  # without a fault they pass
        limit = 30 + 3 * (time.monotonic() - begin)
        mutations = find_mutations(package, folder)
        sample = random.Random(options.seed).sample(mutations, min(options.sample, len(mutations)))
        survivors = tried = 0
        for mutation in sample:
            if time.monotonic() > end:
                break
            result = mutate_and_test([mutation], shlex.join(command), limit)
            tried += 1
            place = f"{mutation.module_path.relative_to(folder)}:{mutation.start_pos[0]}"
            survived = result.test_outcome == TestOutcome.SURVIVED
            survivors += survived
            print("SURVIVED" if survived else "noticed ", place, mutation.operator_name, flush=True)
            if survived:
                print("\n".join(line for line in result.diff.splitlines() if re.match(r"[-+](?![-+])", line)))
        print(f"{tried} of {len(mutations)} faults tried, {survivors} survived")
    return 0


if __name__ == "__main__":
    sys.exit(main())
