"""Scans of whole corpora, to disk: nothing lost, nothing twice, whatever stops them.

`scan` is the driver, `plan` says which windows, `manifest` what a folder is of, `parts` writes,
`folder` reads what was written, `on_ray` shares the work over Ray workers.
"""
