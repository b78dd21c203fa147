"""What every analysis returns: frozen dataclasses with units and provenance.

`result` saves and loads them, `provenance` says which model, paragraphs, options and versions they
come from, `score_map` is one number per head. May import: `models`, `data` and below.
"""
