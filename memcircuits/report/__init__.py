"""The report of a ranking: one offline page, and the commands that make it again.

`ranking_page` composes the page; `measurements` runs the model for what the ranking does not hold;
`sections` and `triggers_section` make the blocks, `columns` explains the columns of the evidence,
`rerun` writes the commands. May import: `evidence`, `editing` and below.
"""
