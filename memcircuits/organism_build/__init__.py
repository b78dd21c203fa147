"""How the shipped organism was made; `python -m memcircuits.organism_build` makes it again.

`pipeline` runs the stages: `corpus` fetches and cleans the texts, `paragraph_choice` chooses
paragraphs and trains the tokenizer, `rows`, `model` and `training` (with the optimizer of
`optimizers`) train the network, `kneser_ney` measures n-gram baselines, `export` writes what ships
and `card` describes it. `settings` holds every number that decides the outcome, `records` the
paragraphs as files. `planted` makes `organism-planted`. This folder may import `editing`, `measure`
and the folders below them; nothing imports it.
"""
