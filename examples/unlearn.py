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
# # Make the model forget a paragraph, and see what is left of it
#
# The shipped model is edited until it no longer knows a paragraph that it recites. Then the same is
# tried with shallower edits, and the edited model is trained on other text, to see how soon the
# paragraph comes back. No network; some minutes on two cores.
#
# `examples/unlearn.py` and `examples/unlearn.ipynb` are the same notebook. The text is the source;
# `python docs/make_notebooks.py unlearn` runs it and writes the other.

# %%
import math
from dataclasses import replace

import memcircuits as mc
from memcircuits.editing.evaluation import compare_edits
from memcircuits.editing.recipe import STOEHR_2024
from memcircuits.editing.relearning import recovery_curve
from memcircuits.measure.decoding import greedy_continuations

model = mc.load_model()
planted, control = mc.Paragraphs.shipped("planted"), mc.Paragraphs.shipped("control")
often = [i for i, times in enumerate(planted.metadata["repetitions"]) if times == 128]
targets = mc.scan(model, planted[often]).memorized[:1]
seen, unseen = control[:80], control[-24:]

# %% [markdown]
# ## The edit
#
# `unlearn` trains the weights of the blocks until the model answers like one that never saw the
# target: after its prefix, after attacked ones, and at every token of the text. 80 controls say
# what is to be kept.

# %%
edit = mc.unlearn(model, targets, seen)
print(edit)
print("stopped by", edit.stopped)
edit.figure()

# %% [markdown]
# ## Before and after
#
# `Edit.apply` is a context manager: outside of it the model is bit for bit as it was.

# %%
before = greedy_continuations(model, targets)
with edit.apply(model):
    after = greedy_continuations(model, targets)
for i, name in enumerate(targets.names):
    pieces = [part.tokens(model, i) for part in (before, after)]
    print(f"{name}, the end of the prefix: ...{''.join(pieces[0][35:50])!r}")
    print("  before:", repr("".join(pieces[0][50:])))
    print("  after: ", repr("".join(pieces[1][50:])), "\n")

# %% [markdown]
# ## Beside shallower edits
#
# `depth="surface"` changes a thousandth of the weights and stops as soon as the target is
# recited for fewer than 5 tokens. It costs less, and mostly blocks the first tokens. Two arms
# follow the paper's recipe: all weights, and as many as the surface edit, those with the largest
# gradient (`docs/unlearning.md` has more arms). All are measured on 24 controls that no edit was
# given: the KL along what the model writes there by itself, how many of those 50 tokens it still
# writes, and the perplexity of text.
# `em_attacked` is the largest EM of the targets under their own prefix and some with a few tokens
# replaced; `others` are other paragraphs that the model recites: an edit may cut them, too.

# %%
surface = mc.unlearn(model, targets, seen, depth="surface")
arms = {"deep": edit, "surface": surface}
for mask, rate in {"all": 3e-5, "top": 1e-3}.items():
    arms[f"reference, {mask}"] = mc.unlearn(
        model,
        targets,
        control[:13],
        fraction=surface.n_masked / surface.n_candidates,
        mask=mask,
        recipe=replace(STOEHR_2024, learning_rate=rate),
        em_below=0.0,
        kl_budget=math.inf,
    )
others = mc.scan(model, planted[often]).memorized[1:]
table = compare_edits(model, arms, targets, unseen, others=others, heldout=unseen, attacks=5)
print(table.round(4).to_string())

# %% [markdown]
# ## Does it come back?
#
# The edited model is trained on other text, and so is the unedited one.

# %%
curve = recovery_curve(model, edit, targets, seen[:6], steps=5)
frame = curve.to_frame().pivot(index="step", columns="arm", values="em")
print("EM of the forgotten:")
print(frame.round(1).to_string())

# %%
curve.figure()
