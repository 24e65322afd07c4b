"""Every kind of bad input gets an error that names the operand, what it has and what was expected."""

import numpy as np
import pytest

import qpdiff

GOOD = {
    "Q": np.tile(np.eye(2), (3, 1, 1)), "q": np.ones((3, 2)), "G": np.ones((1, 2)), "h": np.ones((3, 1)),
    "A": np.array([[1.0, -1.0]]), "b": np.zeros(1), "lb": np.full((3, 2), -5.0), "ub": np.full((3, 2), 5.0),
}  # fmt: skip


def changed(name, index, value):
    array = GOOD[name].copy()
    array[index] = value
    return {name: array}


CASES = [
    (ValueError, r"Q has shape \(3, 2\); expected \(..., n, n\)", {"Q": np.ones((3, 2))}),
    (ValueError, r"Q has shape \(2,\); expected \(..., n, n\), at least 2 axes", {"Q": np.ones(2)}),
    (ValueError, r"Q has shape \(0, 0\)", {"Q": np.ones((0, 0))}),
    (ValueError, r"q has shape \(3,\); expected \(..., n\) with n = 2 from Q", {"q": np.ones(3)}),
    (ValueError, r"G has shape \(1, 3\); .* n = 2 from Q", {"G": np.ones((1, 3))}),
    (ValueError, r"h has shape \(2,\); .* m = 1 from G of shape \(1, 2\)", {"h": np.ones(2)}),
    (ValueError, r"A has shape \(1, 3\)", {"A": np.ones((1, 3))}),
    (ValueError, r"b has shape \(2,\); .* p = 1 from A", {"b": np.ones(2)}),
    (ValueError, r"lb has shape \(3,\)", {"lb": np.ones(3)}),
    (ValueError, r"ub has shape \(1,\)", {"ub": np.ones(1)}),
    (
        ValueError,
        r"q has batch axes \(4,\), which do not broadcast with the batch axes \(3,\) of Q",
        {"q": np.ones((4, 2))},
    ),
    (ValueError, "G was given without h", {"h": None}),
    (ValueError, "b was given without A", {"A": None}),
    (TypeError, "q is None", {"q": None}),
    (ValueError, r"Q has NaN or infinite entries.*problem 1 of", changed("Q", (1, 0, 0), np.nan)),
    (ValueError, r"q has NaN or infinite entries.*problem 2 of", changed("q", (2, 1), np.inf)),
    (ValueError, "G has NaN or infinite entries", changed("G", (0, 1), np.nan)),
    (ValueError, r"h has NaN or -inf.*problem 0 of", changed("h", (0, 0), np.nan)),
    (ValueError, "A has NaN or infinite entries", changed("A", (0, 1), -np.inf)),
    (ValueError, "b has NaN or infinite entries", changed("b", 0, np.inf)),
    (ValueError, r"lb has NaN or \+inf.*problem 1 of", changed("lb", (1, 0), np.inf)),
    (ValueError, r"ub has NaN or -inf.*problem 1 of", changed("ub", (1, 0), -np.inf)),
    (ValueError, r"lb is greater than ub.*problem 2 of", changed("lb", (2, 0), 6.0)),
    (ValueError, r"Q is not symmetric.*problem 1 of", changed("Q", (1, 0, 1), 0.5)),
    (ValueError, r"Q is not positive semidefinite.*problem 2 of", changed("Q", (2, 1, 1), -1.0)),
    (TypeError, "q has dtype complex128", {"q": np.ones((3, 2), dtype=complex)}),
    (TypeError, "q has dtype object", {"q": np.array([[1, None]] * 3)}),
    (TypeError, "q has dtype <U1", {"q": np.array(["a", "b"])}),
    (TypeError, "q has dtype float16", {"q": np.ones((3, 2), dtype=np.float16)}),
    (ValueError, "q is not a regular array", {"q": [[1.0, 2.0], [1.0]]}),
    (TypeError, "q is a builtins.dict", {"q": {}}),
]


@pytest.mark.parametrize(("error", "message", "operands"), CASES, ids=[case[1][:40] for case in CASES])
def test_bad_operands(error, message, operands):
    with pytest.raises(error, match=message):
        qpdiff.solve_qp(**(GOOD | operands))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("tol is -1", {"tol": -1}),
        ("rtol is nan", {"rtol": float("nan")}),
        ("max_iterations is 1.5", {"max_iterations": 1.5}),
        ("max_iterations is -1", {"max_iterations": -1}),
        ("dtype is 'float16'", {"dtype": "float16"}),
    ],
)
def test_bad_options(message, options):
    with pytest.raises(ValueError, match=message):
        qpdiff.solve_qp(**GOOD, **options)


def test_several_batch_axes_in_a_message():
    q = np.ones((2, 3, 2))
    q[1, 2, 0] = np.nan
    with pytest.raises(ValueError, match=r"problem \(1, 2\) of the batch"):
        qpdiff.solve_qp(np.eye(2), q)


def test_mixed_libraries():
    strict = pytest.importorskip("array_api_strict")
    with pytest.raises(TypeError, match="q is an array of array_api_strict but Q one of"):
        qpdiff.solve_qp(np.eye(2), strict.ones(2))


def test_mixed_devices():
    strict = pytest.importorskip("array_api_strict")
    other = strict.Device("device1")
    with pytest.raises(ValueError, match="q is on device"):
        qpdiff.solve_qp(strict.eye(2), strict.ones(2, device=other))


def test_unchecked_numbers_get_a_status():
    sol = qpdiff.solve_qp(**(GOOD | changed("q", (1, 0), np.nan)), check=False)
    assert sol.status[1] != qpdiff.Status.SOLVED
    assert sol.status[[0, 2]].tolist() == [qpdiff.Status.SOLVED] * 2
