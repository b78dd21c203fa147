"""A plain transformers model beside the bridge of the same weights."""

import pytest

from tests.helpers.decoding import PlainModel


@pytest.fixture(scope="session")
def plain_neo():
    """The transformers model behind the fixture `neo`; leave it as it is."""
    return PlainModel("gpt_neo")
