"""The report of a ranking: one offline page, and the commands that make it again.

`ranking_page` composes the page. `measurements` runs the model for what the ranking does not hold:
attention and direct effects (`head_details`), and the scores of a few heads under other ablations
and controls (`robustness`). `sections`, `explorer_section`, `checks_sections` and
`triggers_section` make the blocks, `columns` explains the columns of the evidence,
`component_rows` names the rows, `rerun` writes the commands. May import: `evidence`, `editing` and
below.
"""
