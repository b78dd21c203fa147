"""How the shipped organism was made: `python -m memcircuits.organism_build` makes it again.

`corpus` fetches, `text` cuts, `training` trains, `export` writes and `card` describes it; `planted`
writes the delta of `organism-planted`. May import: `editing`, `measure` and below; nothing imports it.
"""
