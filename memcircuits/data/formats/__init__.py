"""File formats: from bytes to rows, one after the other, in bounded memory.

| content | read as |
| --- | --- |
| a JSON object, text or list of ids a line (`.jsonl`, `.ndjson`) | a row each |
| other JSON (`.json`): arrays, pretty-printed objects, `{"data": [...]}`, columns | a row each |
| tables between commas, tabs, semicolons or bars (`.csv`, `.tsv`) | a row each |
| plain text (`.txt`) | a row for each block between blank lines |
| parquet, Arrow and Feather (`.parquet`, `.arrow`, `.feather`) | a row each |
| integer arrays and tensors (`.npy`, `.npz`, `.pt`), alone, named or in pairs | a row each |
| `hf:NAME[@REVISION][:SPLIT]`, a dataset on the hub or a saved one | a row each |
| a folder | the rows of all its files |

What a file holds decides, not its name (`detection`). Texts may be compressed (gzip, zstd, bz2, xz,
lz4) and UTF-16 or UTF-32; other text must be UTF-8. Which columns hold text or ids, and which
become metadata, says `columns`; masks and labels beside token ids are obeyed (`token_columns`). A
folder says what it passed over (`listing`). A file that cannot be read to its end, or changes while
it is read, ends in a row that says so.

`sources` reads rows in chunks; `records` says what a row is; `opening` unpacks; `text`,
`json_text`, `delimited`, `tables` and `arrays` read. To add a format, write its reader, tell it
from the others in `detection`, and add one line to the table `FORMATS` in `sources`.
"""
