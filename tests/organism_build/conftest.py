"""A finished micro build."""

from __future__ import annotations

import pytest

from memcircuits.organism_build.pipeline import build
from tests.organism_build.micro import MICRO, MicroBuild, prose


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> MicroBuild:
    """A finished micro build; leave its folders as they are."""
    documents = {"one": [prose(9000, 1)], "two": [prose(4000, 2), prose(3000, 3)]}
    out, work = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("work")
    return MicroBuild(out, work, documents, build(out, work, MICRO, documents=documents))
