"""Is the answer right? Localizers scored on paragraphs planted in known places.

`localizers` is the table of methods (`by_weights`, `by_gates`, `by_interventions`), `kinds` the
kinds of trial, `trials` runs them, `leaderboard` and `pages` report. May import: `evidence`,
`editing` and below.
"""
