"""Models and pairs of prompts for patching."""

import pytest

import memcircuits as mc
from tests.helpers.organism import recited
from tests.helpers.patching import PatchingCase


@pytest.fixture(scope="session")
def case(request):
    """A tiny model by name and pairs of prompts; leave it as it is."""
    return PatchingCase.of(request.param)


@pytest.fixture(scope="session")
def neo_case():
    """A tiny GPT-Neo and pairs of prompts; leave it as it is."""
    return PatchingCase.of("gpt_neo")


@pytest.fixture(scope="session")
def organism_pairs():
    """The organism, eight paragraphs that it recites, and their corrupted counterparts.

    How good a first-order estimate is depends on the weights: random ones make everything above z
    about as curved as it can be, so estimates are judged on trained weights.
    """
    model = mc.load_model()
    return model, *mc.perturb_prefix(model, recited(model, 8)).pairs()
