"""`memcircuits gradients`: its page shows the largest gradient of every matrix."""

import re

import pytest

import memcircuits as mc
from memcircuits.commands.gradients import _page
from tests.helpers.gradients import CONTROL, PARAGRAPHS

pytestmark = pytest.mark.any_version


def test_every_set_has_a_map_of_its_matrices(neo):
    results = {
        name: mc.parameter_gradients(neo, paragraphs, progress=False)
        for name, paragraphs in {"memorized": PARAGRAPHS, "control": CONTROL}.items()
    }
    html = _page(results).render().replace("\N{MINUS SIGN}", "-")
    for name, result in results.items():
        shown = html.split(f"{name}: {result}")[-1]
        largest = result.to_frame().groupby(["layer", "component"])["value"].max()
        for (layer, component), value in largest.items():
            cell = re.search(rf"<title>layer {layer}, matrix {component}: ([0-9.e-]+) nats", shown)
            assert float(cell[1]) == pytest.approx(value, rel=0.05), (name, layer, component)
