# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Planting and finding
#
# Nobody knows where a public model keeps a paragraph, so nobody can say whether a method that
# points at a head is right. Here it is known: paragraphs are written through weights that we choose
# and through no others, and then looked for. No network; a minute or two on two cores.
#
# `examples/planting.py` and `examples/planting.ipynb` are the same notebook. The text is the
# source; `python docs/make_notebooks.py planting` runs it and writes the other.

# %%
import pandas as pd

import memcircuits as mc
from memcircuits.benchmark.localizers import localize
from memcircuits.benchmark.units import LocalizationTask, truth_of
from memcircuits.organism.delta import HEAD

# %% [markdown]
# ## A model in which the answer is known
#
# `organism-planted` is the shipped model with four of its controls written through one head. It
# recites them now; the unplanted model does not.

# %%
model = mc.load_model("organism-planted")
control = mc.Paragraphs.shipped("control")
scan = mc.scan(model, control)
print(f"planted model: {scan}")
print(f"without: {mc.scan(mc.load_model(), scan.memorized)}")
print(f"written through {HEAD}")

# %%
ranking = mc.find_memorization_heads(model, control, unigrams=mc.UnigramTable.shipped())
print(ranking.summary())
columns = ["rank", "layer", "head", "score", "ci_low", "ci_high", "em_memorized", "em_control"]
print(ranking.to_frame()[columns].head(5).round(3).to_string(index=False))
ranking.figure()

# %% [markdown]
# ## Write somewhere else, and ask every method
#
# `plant` fine-tunes the named weights until the paragraphs are recited, and keeps the model's
# answers to other texts where they were. Inside `with planted.apply(model)` the model recites them.

# %%
organism = mc.load_model()
targets, anchors = control[:2], control[40:60]
planted = mc.plant(organism, targets, where="L2H4", control=anchors)
print(planted)
print(f"heads {planted.truth.heads}, layers {planted.truth.layers}")

# %%
names = ["zero-ablation", "attribution", "gradient-max", "gradient-fisher", "rare-token-attention"]
rows = []
with planted.apply(organism):
    task = LocalizationTask(organism, targets, control[60:68], unigrams=mc.UnigramTable.shipped())
    truth = truth_of(task.adapter, planted, "head")
    for name in [*names, "random"]:
        scores = localize(task, name, "head")
        order = scores.argsort(descending=True)
        place = int(truth[order].nonzero()[0]) + 1
        best = mc.Head(*divmod(int(order[0]), task.adapter.n_heads))
        rows.append({"localizer": name, "says": str(best), "rank of the written head": place})
print(pd.DataFrame(rows).to_string(index=False))

# %% [markdown]
# One trial proves little: `memcircuits bench localize` repeats this over many places and kinds of
# truth. And a paragraph that training has spread over the whole model need not sit where a planted
# one does.
#
# ## Leave it as it was
#
# Outside the block the model is bit for bit the one that came in.

# %%
print(f"afterwards: {mc.scan(organism, targets)}")
