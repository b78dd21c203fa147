"""Can the recitation be removed, or written? Sparse changes of weights.

`masks` says which weights may change, `edit` is a change that can be applied, saved and taken
back, `unlearning` and `planting` find changes, `evaluation`, `relearning` and `noise` say what they
did, `export` writes the edited model. May import: `measure` and below; not `evidence`.
"""
