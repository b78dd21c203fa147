"""Which heads and MLPs are enough for a text? Subnetworks by trained masks, and their core.

`hard_concrete` trains masks, `mean_ablation` runs a model under them, `core` finds what the
subnetworks of many seeds share, and `results` holds it. May import: `measure` and below.
"""
