"""How numbers and text look, in figures and on pages; nothing here knows a model.

`text` (the doors through which untrusted text enters), `numbers`, `palette`; `figures` are plotly,
`pages` are single HTML files that work offline, `html_table` is a table in a notebook. May import:
`base`.
"""
