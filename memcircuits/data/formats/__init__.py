"""File formats: from bytes to rows, one after the other, in bounded memory.

`sources` finds files and reads chunks of them; `records` says what a row is; `text` reads JSON
lines, CSV and plain text; `tables` reads parquet, arrays, tensors and datasets. To add a format, add
a reader and a line to the table `FORMATS` in `sources`.
"""
