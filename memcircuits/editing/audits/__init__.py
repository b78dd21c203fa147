"""Is a text erased, or only hidden? An audit of an edit against a model that never saw the text.

`audit` is `audit_edit`. It measures the unedited model, the edited one and the reference by
`measures`, after `rounding` too, and by `layers`; `result` is what it returns, `page` shows
it, and `verdict` says in words what the numbers mean.
"""
