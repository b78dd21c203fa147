"""What is recited? Numbers of the model on paragraphs, before any question of where.

`continuation` scores the true continuation, `scanning` is `scan`, `decoding` generates greedily,
`gradients` and `fisher` differentiate the loss, `corpus` scans whole corpora to disk. May import:
`results` and below.
"""
