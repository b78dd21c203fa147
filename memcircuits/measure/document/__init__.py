"""The map of a document: which parts of a whole book or file does the model recite?

`mapping` is `document_map`, which scores every window of a document by a scan to disk;
`document_map` is its result, `spans` merges windows into passages, and `page` shows the text with
what is recited in it.
"""
