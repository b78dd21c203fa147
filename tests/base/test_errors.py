"""Checks of arguments: what they accept, and what their message says."""

import pickle

import pytest

import memcircuits as mc
from memcircuits.base.errors import at_least, fraction, one_of, positive, sequence

NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("check", "accepted", "refused", "remedy"),
    [
        pytest.param(
            lambda v: one_of("mode", v, ("zero", "mean")),
            ["zero", "mean"],
            ["Zero", "", None, 0],
            "choose one of mean, zero",
            id="one_of",
        ),
        pytest.param(
            lambda v: at_least("n", v, 1),
            [1, 10**9],
            [0, -1, 1.0, True, "1", None],
            "give an integer of at least 1",
            id="at_least",
        ),
        pytest.param(
            lambda v: fraction("p", v),
            [1e-9, 0.5, 1, 1.0],
            [0, 0.0, -0.1, 1.1, NAN, INFINITE, True, "0.5", None],
            r"give a number in \(0, 1\]",
            id="fraction",
        ),
        pytest.param(
            lambda v: fraction("p", v, zero=True),
            [0, 0.5, 1],
            [-0.1, 1.1, NAN, False],
            r"give a number in \[0, 1\]",
            id="fraction or zero",
        ),
        pytest.param(
            lambda v: positive("x", v),
            [1e-300, 3, 1e300],
            [0, -1, NAN, INFINITE, True, "1", None],
            "give a positive number",
            id="positive",
        ),
        pytest.param(
            lambda v: sequence("heads", v),
            [None, [], ["L0H1"], (1, 2), {1}],
            ["L0H1", 1, iter([1])],
            "give a list",
            id="sequence",
        ),
    ],
)
def test_a_check_accepts_and_refuses(check, accepted, refused, remedy):
    for value in accepted:
        check(value)
    for value in refused:
        with pytest.raises(mc.InputError, match=remedy):
            check(value)


def test_a_long_value_is_cut_in_the_message():
    error = mc.InputError("ids", "x" * 500, "give less")
    assert str(error) == f"ids: {'x' * 117}...; give less"


def test_an_error_survives_the_way_from_a_worker():
    error = pickle.loads(pickle.dumps(mc.InputError("layer", 9, "there are 4")))
    assert isinstance(error, mc.InputError)
    assert (error.argument, str(error)) == ("layer", "layer: 9; there are 4")
