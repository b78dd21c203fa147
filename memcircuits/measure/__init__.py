"""What is recited? Numbers of the model on paragraphs, before any question of where.

`continuation` scores the true continuation, `scanning` is `scan`, `decoding` generates greedily,
`paragraph_measures` derives EM, NLL and the other measures from these scores, `sampling` says how
text is drawn and `near_verbatim` finds recitations with slips. `snippets` and `scan_page` show the
passages. `gradients` and `fisher`
differentiate the loss, `corpus` scans whole corpora to disk. May import: `results` and below.
"""
