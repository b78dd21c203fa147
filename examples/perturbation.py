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
# # Which token triggers a recitation, and what carries it?
#
# Every prefix token of one memorized paragraph is replaced in turn. Then the model's activations
# before and after the most decisive replacement are exchanged, head by head and layer by layer, to
# see which of them bring the recitation back. No network; half a minute on two cores.
#
# `examples/perturbation.py` and `examples/perturbation.ipynb` are the same notebook. The text is
# the source; `python docs/make_notebooks.py perturbation` runs it and writes the other.

# %%
import memcircuits as mc
from memcircuits.evidence.patching.sweeps import patch_layers


def flat(tokens: list[str]) -> str:
    return " ".join("".join(tokens).split())


model = mc.load_model()
unigrams = mc.UnigramTable.shipped()
planted = mc.Paragraphs.shipped("planted")
rarely = [i for i, times in enumerate(planted.metadata["repetitions"]) if times == 64]
paragraph = mc.scan(model, planted[rarely]).memorized[0]
tokens, n = paragraph.tokens(model), paragraph.n_prefix
print(f"{paragraph.names[0]} was planted 64 times. After the prefix\n  {flat(tokens[:n])}")
print(f"the model goes on\n  {flat(tokens[n:])}")

# %% [markdown]
# ## One token at a time
#
# Each of the 50 prefix tokens is replaced by four random others in turn. The drop is how many of
# the 50 tokens are no longer recited, on average over the four; `em_se` is its standard error.

# %%
perturbed = mc.perturb_prefix(model, paragraph, draws=4)
print(perturbed)
frame = perturbed.to_frame().sort_values("drop", ascending=False).head(5)
frame["token"] = [repr(tokens[position]) for position in frame["position"]]
columns = ["position", "token", "em", "em_se", "drop", "surprisal"]
print(frame[columns].round(2).to_string(index=False))

# %%
perturbed.figure(0)

# %% [markdown]
# Is it the rare tokens that trigger? Position, rarity and surprisal side by side, as rank
# correlations with the drop over the 50 tokens of this one paragraph. (Over 60 paragraphs it is the
# position: [trigger tokens](../docs/triggers.md).)

# %%
print(perturbed.causes(unigrams)[["cause", "spearman"]].round(2).to_string(index=False))

# %% [markdown]
# ## What the model writes without it

# %%
clean, corrupted = perturbed.pairs()
position, em = corrupted.metadata["position"][0], corrupted.metadata["em"][0]
new = corrupted.tokens(model)
print(f"{new[position]!r} in the place of {tokens[position]!r} leaves {em} of 50 tokens:")
print(f"  {flat(new[n:])}")

# %% [markdown]
# ## Which head brings it back?
#
# The model reads the corrupted prefix, but one head is given what it had on the clean one
# (denoising). The share is how much of the way to the clean run's first differing token that goes:
# 100 % would undo the replacement.

# %%
options = {"metric": "logit_diff", "direction": "denoising"}
for site, positions in {"v": "changed", "z": None}.items():
    patched = mc.patch_heads(model, clean, corrupted, site=site, positions=positions, **options)
    print(patched)

# %%
patched.figure()

# %% [markdown]
# No head does much by itself. The same with what each layer's MLP writes at the replaced token: the
# first one undoes all of it, here and in most paragraphs ([trigger tokens](../docs/triggers.md)).

# %%
layers = patch_layers(model, clean, corrupted, site="mlp_out", positions=[position], **options)
for layer, share in enumerate(layers.share[:, 0].tolist()):
    print(f"MLP of layer {layer}: {share:4.0%}")
