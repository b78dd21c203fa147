"""The commands of the command line, one module each; `memcircuits.cli` assembles them.

A command translates options into one call of a public function, prints its result and writes its
files. What several commands share: `inputs` (the model and the paragraphs), `options`, `selection`
(which paragraphs), `output` (tables, progress, and JSON as `output.schema.json` has it),
`shared_by_edits` (for `unlearn` and `edit`), `scan_options` (for `scan` and `map`), and `common`
(options in dataclasses, errors in one line).

Packages that take seconds to import are imported inside the functions, so that
`memcircuits --help` answers at once.
"""
