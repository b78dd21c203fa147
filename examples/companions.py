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
# # Three questions beside the recitation
#
# How do recited texts differ from others? What if a prefix is cut inside a token? Which text
# teaches which, and what does forgetting one harm? Each comes from a paper of its own. (Which
# neurons write the next token, and which heads every subnetwork shares: `examples/anatomy.ipynb`.)
# No network; two minutes on two cores.
#
# `examples/companions.py` and `examples/companions.ipynb` are the same notebook. The text is the
# source; `python docs/make_notebooks.py companions` runs it and writes the other.

# %%
import torch

import memcircuits as mc

model = mc.load_model()
scan = mc.scan(model, mc.Paragraphs.shipped())
generator = torch.Generator().manual_seed(0)
recited = scan.memorized.sample(24, generator)
others = scan.control.sample(24, generator)
print(scan)

# %% [markdown]
# ## How do recited texts differ from others?
#
# By their text, by the model's probabilities and by its hidden states, layer by layer
# ([Li et al. 2024](https://arxiv.org/abs/2403.00510)). A difference of the text alone is no sign of
# memory: it is the same in a model that has never seen the text.

# %%
contrast = mc.contrast(model, recited, others, unigrams=mc.UnigramTable.shipped())
print(contrast)
columns = ["family", "feature", "memorized", "control", "auc", "q_value"]
frame = contrast.to_frame()
print(frame[frame["layer"].isna()][columns].round(3).to_string(index=False))
contrast.figure()

# %% [markdown]
# ## What if a prefix is cut inside a token?
#
# An audit that cuts after some number of characters mostly cuts inside a token. Encoded as it is,
# such a prefix ends in tokens that the model never saw there. Token alignment takes them back and
# chooses among those that agree with the text
# ([Athiwaratkun et al. 2024](https://arxiv.org/abs/2403.08688)). Missed is what the audit does not
# see: aligned minus naive.

# %%
cut = mc.cut_prefix(model, recited[:8])
print(cut)
columns = ["place", "n", "cuts", "naive", "aligned", "marginal", "missed", "missed_low"]
frame = cut.by_place()
print(frame[frame["measure"] == "in full"][columns].round(2).to_string(index=False))
cut.figure()

# %% [markdown]
# Texts that come cut in two are encoded as one, so that a scan sees what the model saw:

# %%
texts = recited[:8].texts(model)
pairs = [(text[:200], text[200:]) for text in texts]
for align in (True, False):
    paragraphs = mc.Paragraphs.from_texts(pairs, model, n_prefix=40, n_continuation=30, align=align)
    print(f"align={align}: mean EM {mc.scan(model, paragraphs).em.float().mean():.1f} of 30")

# %% [markdown]
# ## Which text teaches which?
#
# One gradient step on each text, and the change of log p of each recitation
# ([Chen et al. 2024](https://arxiv.org/abs/2402.12530)). Which of these texts helps a recitation
# most, per length of its step? And after a step of unlearning, which other recitations suffer?

# %%
taught = mc.influence(model, recited[:6] + others[:6], recited[:6])
print(taught.teachers()[["tested", "teacher", "own_rank", "next"]].to_string(index=False))
harmed = mc.influence(model, recited[:6], eta=-1e-6)
loss = harmed.values.clone().fill_diagonal_(0)
most, least = (int(x) for x in (loss.sum(1).argmin(), loss.sum(1).argmax()))
print(f"a step against {recited.names[most]} harms the others most, {recited.names[least]} least")
taught.figure()
