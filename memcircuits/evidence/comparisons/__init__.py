"""What changed between two models: passages gained and lost, and heads that matter more or less.

`compare` takes two models, scans or rankings. `passages` pairs the paragraphs of two scans, `heads`
the effects of ablating each head, `result` holds both and `page` shows them.
"""
