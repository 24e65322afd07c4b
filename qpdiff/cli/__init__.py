"""The command line: solve the problems of a file, draw that, check their gradients, tell what is installed.

A file is a NumPy ``.npz`` with the arrays Q, q and any of G, h, A, b, lb, ub, with or without batch axes, or an MPS,
QPS or LP file. The objective is printed and saved as the file states it: with its constant term, and maximised where it
says so. All else of a solution is that of the problem that is minimised, see `qpdiff.files.read_problem`.
"""

from .commands import app

__all__ = ["app"]
