"""Run public analyses with their annotated shapes and types checked.

`python -m tests.helpers.shapes MODEL`; see tests/robustness/test_shapes.py.

The checker must be installed before the package is imported, and it refuses bad input before the
package can say what is wrong with it; so it runs in a process of its own.
"""

import sys

import jaxtyping

from tests.helpers import typechecker

if __name__ == "__main__":
    jaxtyping.install_import_hook("memcircuits", f"{typechecker.__name__}.checked")
    import memcircuits as mc
    from memcircuits.models.registry import validate_model
    from tests.helpers import models as zoo

    model = zoo.bridge(sys.argv[1])
    paragraphs = zoo.mixed(model)
    validate_model(model)
    mc.scan(model, paragraphs).to_frame()
    for mode in ("zero", "mean", "resample"):
        mc.ablate_heads(model, paragraphs, mode=mode).to_frame()
    mc.parameter_gradients(model, paragraphs).to_frame()
    mc.rare_token_attention(model, paragraphs, permutations=5).to_frame()
    mc.find_memorization_heads(model, paragraphs, draws=10).to_frame()
    mc.attention_view(model, paragraphs[0], layer=1).to_html()
    print("checked")
