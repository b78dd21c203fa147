"""The name of a head: read in three forms, written in one."""

import pytest

import memcircuits as mc


@pytest.mark.parametrize("value", [mc.Head(1, 2), "L1H2", " l1h2 ", (1, 2), [1, 2]])
def test_a_head_is_read_in_three_forms(value):
    assert mc.Head.of(value) == (1, 2)
    assert str(mc.Head.of(value)) == "L1H2"


@pytest.mark.parametrize(
    "value", ["", "L1", "H2", "L-1H2", "L1H2x", 1, (1,), (1, 2, 3), (1, "2"), None]
)
def test_what_is_no_head_is_refused(value):
    with pytest.raises(mc.InputError, match="write it like L1H2"):
        mc.Head.of(value)


def test_a_head_that_the_model_lacks_is_refused():
    assert mc.Head(3, 7).within(4, 8, "head") == (3, 7)
    for layer, head in [(4, 0), (0, 8), (-1, 0)]:
        with pytest.raises(mc.InputError, match="there are 4 layers of 8 heads"):
            mc.Head(layer, head).within(4, 8, "head")
