"""File formats: from bytes to rows, one after the other, in bounded memory.

| ending | content |
| --- | --- |
| `.jsonl` | one object a line with token ids, `prefix_ids` and `suffix_ids`, or text |
| `.csv` | a column of text |
| `.txt` | paragraphs separated by blank lines |
| `.parquet` | columns as in `.jsonl` |
| `.npy` | an integer array [paragraph, pos]; `NAME_prefix.npy` with `NAME_suffix.npy` beside it |
| `.pt` | an integer tensor [paragraph, pos], read with `weights_only=True` |
| `hf:NAME[@REVISION][:SPLIT]` | a dataset on the hub, streamed, or a folder that `datasets` saved |

Token ids are a column `ids`, `tokens`, `input_ids` or `token_ids`, text is one `text` or
`paragraph`; `id` (or `index`) names the paragraphs, every other column becomes their metadata. The
first three formats may be compressed (`.gz`, `.zst`); a folder means all its files.

`sources` finds files and reads chunks of them; `records` says what a row is; `text` reads JSON
lines, CSV and plain text; `tables` reads parquet, arrays, tensors and datasets. To add a format,
write its reader and add one line to the table `FORMATS` in `sources`.
"""
