"""What goes into a model: files become rows, rows become windows of token ids, `Paragraphs`.

`formats` reads files; `windows` cuts rows; `tokens` encodes and decodes; `bos` says which tokens
stand in front of text; `paragraphs` holds a prefix and a continuation each, made by `reading`, with
what follows from their ids in `token_rows`; `row_notes` counts the rows that were skipped or cut;
`overlap` says which sets may be compared; `unigrams` says how rare a token is. May import: `base`,
`display`, `organism`; it knows tokenizers but no models.
"""
