"""The last file of this folder: counts what the others tried, and prints it under `-rP`."""

import pytest

from tests.helpers.fuzz import COUNTS, TRIED

pytestmark = pytest.mark.any_version


def test_the_promised_number():
    for kind, n in sorted(TRIED.items()):
        print(f"{n:6} {kind}")
    print(f"{TRIED.total():6} malformed inputs")
    if set(COUNTS) <= set(TRIED):  # else only some of the tests ran in this process
        assert TRIED.total() >= 2000
        assert all(TRIED[kind] >= n for kind, n in COUNTS.items())
