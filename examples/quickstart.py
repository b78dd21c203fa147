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
# # Which heads does the shipped model's recitation depend on?
#
# The model that ships with memcircuits was trained on some paragraphs up to 128 times. This
# notebook finds out which paragraphs the model recites, which attention heads the recitation
# depends on, which tokens of a prefix trigger it, and what the heads attend to. It needs no network
# and takes about two minutes on two cores.
#
# `examples/quickstart.py` and `examples/quickstart.ipynb` are the same notebook. The text is the
# source; `python docs/make_notebooks.py quickstart` runs it and writes the other. Run as a script,
# `python examples/quickstart.py` prints the main results and writes `quickstart.html`.

# %%
import memcircuits as mc

model = mc.load_model()
paragraphs = mc.Paragraphs.shipped()
unigrams = mc.UnigramTable.shipped()

# %% [markdown]
# ## Which paragraphs are recited?
#
# Each paragraph is 50 tokens of prefix and 50 of continuation. EM counts the tokens of the
# continuation that the model writes by itself before its first mistake: 50 is all of it.

# %%
scan = mc.scan(model, paragraphs)
print(scan.by_repetitions().round(3).to_string(index=False))
scan

# %%
scan.figure()

# %% [markdown]
# ## Which heads does the recitation depend on?
#
# Each head is removed by itself. Its score is how much that raises the loss on memorized
# paragraphs beyond what it does to controls, in nats/token. The scan says which are which.

# %%
ranking = mc.find_memorization_heads(model, scan, unigrams=unigrams, max_paragraphs=40)
ranking

# %%
ranking.figure()

# %% [markdown]
# ## Which tokens of the prefix trigger it?
#
# Every prefix token is replaced by a random other one, one at a time.

# %%
one = ranking.memorized[0]
perturbed = mc.perturb_prefix(model, one, draws=3)
print(perturbed)
perturbed.figure(0)

# %% [markdown]
# ## What do the heads attend to?
#
# The memorized paragraph on the left; on the right the same with its most decisive token replaced,
# and what the model writes then. Choose a head, click a token.

# %%
pair = perturbed.pairs()
ranking.attention(pair.clean, compare=pair.corrupted)

# %%
rare = mc.rare_token_attention(model, ranking.memorized, unigrams)
rare.figure(head=(0, 3))

# %% [markdown]
# ## All of it on one page

# %%
print(scan, ranking.summary(), sep="\n")
print(f"wrote {ranking.to_html('quickstart.html')}")
