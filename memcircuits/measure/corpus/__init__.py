"""Scans of whole corpora to disk, which survive interruption: no part is lost or written twice.

`scan` is the driver and describes the algorithm. `preparation` checks a scan before it starts,
`plan` says which windows are scanned, `manifest` what a folder is a scan of, `parts` writes the
results, `folder` reads them, and `on_ray` shares the work among Ray workers.
"""
