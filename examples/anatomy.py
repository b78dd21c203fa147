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
# # Anatomy of one recitation
#
# One paragraph that the shipped model recites, taken apart: how sure the model is of each token,
# which tokens of the prefix trigger it, how few of them stop or start it, which heads it needs and
# which every subnetwork shares, which neurons write its tokens, which heads carry the trigger, and
# what those look at. No network; two minutes on two cores.
#
# `examples/anatomy.py` and `examples/anatomy.ipynb` are the same notebook. The text is the source;
# `python docs/make_notebooks.py anatomy` runs it and writes the other.

# %%
import memcircuits as mc
from memcircuits.evidence.triggers.minimal_sets import minimal_sets

model = mc.load_model()
unigrams = mc.UnigramTable.shipped()
planted = mc.Paragraphs.shipped("planted")
often = [i for i, times in enumerate(planted.metadata["repetitions"]) if times == 64]
scan = mc.scan(model, planted[often])
print(scan)

# %% [markdown]
# ## The paragraph
#
# Of the paragraphs that were trained on 64 times, the recited one that the model is least sure of:
# its recitation is the easiest to disturb. The margin of a token is how far its logit is
# above the next best.

# %%
thinnest = scan.margin.masked_fill(~scan.is_memorized, float("inf")).argmin()
paragraph = scan.paragraphs[int(thinnest)]
tokens, n = paragraph.tokens(model), paragraph.n_prefix
print(
    f"{paragraph.names[0]}\n\nprefix:\n{''.join(tokens[:n])}\n\nrecited:\n{''.join(tokens[n:])}\n"
)
margins = scan.token_margin[int(thinnest)]
for place in margins.argsort()[:3].tolist():
    before = "".join(tokens[n + place - 4 : n + place])
    print(f"margin {margins[place]:.2f} at {tokens[n + place]!r}, after {before!r}")

# %% [markdown]
# ## Which prefix tokens trigger it?
#
# Each is replaced by four random others in turn; the drop is how many of the 50 tokens are lost.

# %%
perturbed = mc.perturb_prefix(model, paragraph, draws=4)
print(perturbed)
worst = perturbed.to_frame().sort_values("drop", ascending=False).head(5)
worst["token"] = [repr(tokens[position]) for position in worst["position"]]
print(worst[["position", "token", "em", "em_se", "drop"]].round(2).to_string(index=False))
perturbed.figure(0)

# %% [markdown]
# How few replaced tokens stop it altogether, and how short a suffix of the prefix still starts it?

# %%
few = minimal_sets(model, paragraph)
print(few.to_frame().to_string(index=False))

# %% [markdown]
# ## Which heads does it need?
#
# Each head's output is set to zero, one head at a time. Zeros are far from anything a head
# normally says, so its mean over controls is put there as well: what both agree on is the safer
# finding.

# %%
zero = mc.ablate_heads(model, paragraph)
by_mean = mc.ablate_heads(
    model, paragraph, mode="mean", reference=mc.Paragraphs.shipped("control")[:40]
)
for result in (zero, by_mean):
    lost = result.measure("em")
    best = [f"{head} ({round(-float(lost[head]))} tokens)" for head in result.top(5)]
    print(f"{result.name}: {', '.join(best)}")
print(f"rank correlation of the two: {zero.correlation(by_mean):.2f}")
zero.figure()

# %% [markdown]
# ## Which heads does every part of the model that recites share?
#
# Masks close half of the heads and MLPs, three times with different seeds, for recitations and for
# paragraphs that the model never saw. What all three keep is the core. By default there are twelve.

# %%
never_seen = mc.Paragraphs.shipped("control")
shared = mc.core(model, scan.memorized, never_seen[:40], seeds=3, steps=40)
print(shared)
print("only for recitations:", *shared.own_heads)
columns = ["set", "condition", "n", "em", "accuracy", "nll"]
print(shared.effects()[columns].round(2).to_string(index=False))
shared.figure()

# %% [markdown]
# ## Which neurons write the next token, and which heads call them?
#
# Neurons whose output points at one token, and the head that adds most to their input. Does the
# neuron fall without that head on other paragraphs? The same for random neurons, to compare.

# %%
calls = mc.lookups(model, scan.memorized + never_seen[:20], neurons=4, prompts=10)
print(calls.summary().round(2).to_string(index=False))
print(calls.to_frame().head(4).round(2).to_string(index=False))

# %% [markdown]
# ## Which heads carry the trigger?
#
# The most destructive replacement makes the corrupted paragraph. One head's output of the clean run
# is put into the corrupted run: how far does that move the result back to the right token?

# %%
clean, corrupted = perturbed.pairs()
changed, wrong = corrupted.metadata["position"][0], corrupted.metadata["first_impacted"][0]
new = corrupted.tokens(model)
print(f"{tokens[changed]!r} -> {new[changed]!r} at position {changed}; the first wrong token:")
print(f"{new[n + wrong]!r} instead of {tokens[n + wrong]!r}, at {wrong} of the continuation")
patched = mc.patch_heads(
    model, clean, corrupted, site="z", metric="logit_diff", direction="denoising"
)
for head in patched.top(3):
    print(f"  {head} brings back {float(patched.share[head]):.0%} of the difference")
patched.figure()

# %% [markdown]
# ## What do those heads look at?
#
# The clean paragraph is on the left, the corrupted one on the right. Choose a head, click a token.

# %%
view = mc.attention_view(model, clean, heads=patched.top(4), compare=corrupted, unigrams=unigrams)
print(f"wrote {len(view.to_html('anatomy.html')) / 1e6:.1f} MB to anatomy.html")
view
