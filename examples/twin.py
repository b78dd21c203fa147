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
# # What did training itself write?
#
# The organism has a twin: the same base weights, the same rows in the same order, but half of the
# paragraphs are swapped for others. What differs between the two is what training on those
# paragraphs wrote. This notebook follows one paragraph that the organism recites and the twin has
# never seen: how many bits are remembered, at which tokens, and which components hold them.
# `docs/twin.md` has the same over many paragraphs. No network; a minute on two cores.
#
# `examples/twin.py` and `examples/twin.ipynb` are the same notebook. The text is the source;
# `python docs/make_notebooks.py twin` runs it and writes the other.

# %%
import memcircuits as mc
from memcircuits.measure.decoding import greedy_continuations

model = mc.load_model()
twin = mc.load_model("organism-twin")
swapped = mc.Paragraphs.shipped("organism")  # only the organism was trained on these
bits = mc.counterfactual(model, twin, swapped, ngram=mc.UnigramTable.shipped())
print(bits)

# %% [markdown]
# ## Who recites them?
#
# The dose is the number of times that training saw a paragraph. The organism recites those that it
# saw often enough; the twin saw none of them. Remembered bits are those that the organism knows
# beyond its twin: what it learned about these paragraphs from these paragraphs.

# %%
columns = ["repetitions", "n", "em", "twin_em", "remembered", "remembered_low", "remembered_high"]
print(bits.by("repetitions")[columns].round(1).to_string(index=False))

# %% [markdown]
# ## One paragraph
#
# The one with the most remembered bits among those that the organism recites in full. Both models
# are given the same prefix of 50 tokens and write 50 more.

# %%
frame = bits.to_frame()
number = frame[frame["em"] == 50]["remembered"].idxmax()
one = swapped[[number]]
print("prefix:  ", repr(model.to_string(one.ids[0, :50])))
for name, writer in (("organism", model), ("twin", twin)):
    written = greedy_continuations(writer, one, progress=False)
    print(f"{name}:", repr(model.to_string(written.ids[0, 50:])))

# %% [markdown]
# ## Which of its tokens are remembered?
#
# The bits of each token are split into four parts, which add up to the 12 bits that name one of
# 4,096 tokens: guessable (an n-gram model of counts knows them), known (the twin knows them, from
# ordinary English and from the text before), remembered (only the organism does), and unexplained.
# The second half of a word is mostly known; which word comes next is remembered.

# %%
print(bits.tokens(number, model).round(1).head(12).to_string(index=False))
bits.figure(number, model)

# %% [markdown]
# ## Where was it written?
#
# Every component of the twin is put into the organism, one at a time: by how much does the loss of
# the paragraph rise (necessity)? And every component of the organism into the twin: by how much
# does the loss fall (sufficiency)? Weights are exchanged, so the answer is about what training
# wrote, and not about what the model needs for any text. `all` is every weight at once; where each
# part by itself has a small share of it, the paragraph is spread over the model.

# %%
where = mc.transplant(model, twin, one, units=["head", "mlp", "attn", "layer", "all"])
print(where)
columns = ["unit", "layer", "head", "necessity", "sufficiency", "em_lost", "em_gained"]
table = where.to_frame()[columns].sort_values("necessity", ascending=False)
print(table.head(12).round(2).to_string(index=False))
where.figure()

# %% [markdown]
# A user without a twin removes each component in turn and compares the paragraph with controls.
# `docs/twin.md` says how far such a ranking agrees with transplants, over many paragraphs and
# beside other localizers.

# %%
control = mc.Paragraphs.shipped("control")[:16]
ranking = mc.find_memorization_components(model, one, control=control, units=("head", "mlp"))
print(ranking.to_frame()[["unit", "layer", "head", "rank", "score"]].head(8).to_string(index=False))
