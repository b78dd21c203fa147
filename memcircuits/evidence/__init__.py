"""Where does the recitation live? One file for each kind of evidence about heads and tokens.

`interventions` changes activations in the middle of a forward pass; `ablation`, `screening`,
`rare_tokens`, `gradients`, `triggers` and `patching` measure; `find_heads` puts the evidence about
heads together into a `ranking`. May import: `measure` and below; not `editing`.
"""
