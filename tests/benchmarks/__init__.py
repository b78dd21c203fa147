"""How fast is it, against what people use today? `python -m tests.benchmarks`.

Every job is done by this package and by its rivals in one run, on the same weights and inputs, with
the rivals used as their own documentation shows and at the batch size that suits them best. Ours
and theirs take turns; reported is the median ratio of at least five such rounds, together with the
difference of the outputs, the arithmetic of both (counted, not estimated) and the rate at which it
is done, against a large matrix product on the same machine.

| module | idea |
| --- | --- |
| `subjects` | the models and paragraphs measured |
| `rivals` | the same jobs through TransformerLens, transformers and nnsight |
| `jobs` | ours beside the rivals, in the same units |
| `timing` | turns, medians, batch sizes, arithmetic |
| `memory` | peak memory, each job in a process of its own |
| `variants` | our own scan in other ways: what helps and what does not |
| `screens` | where a screen takes its slopes |
| `growth` | cost against paragraphs, heads and layers |
| `page` | docs/benchmarks.md, .json and the plot |
"""
