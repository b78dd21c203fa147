"""What every other folder uses; nothing here knows a model, a paragraph or a result.

`errors` (one-line errors and argument checks), `heads` and `components` (names of parts of a
model), `io` (files that appear whole or not at all), `json_values` (JSON of any value), `progress`
(bars on stderr), `statistics` (bootstrap, permutation, Benjamini-Hochberg). May import: nothing of
the package.
"""
