"""TransformerLens behind one interface: the only folder that knows model classes and architectures.

`registry.adapt(model)` gives the `adapter.Adapter` that all analyses take. An adapter is composed
of one module for each thing that it does:

| module | what an adapter does with it |
| --- | --- |
| `architecture` | say what a model is: class, sizes, basis; check heads and tokens |
| `hooks` | name activations, read and replace them during a forward pass |
| `weights`, `layout` | find weight matrices, by trying, as [head, d_in, d_out] |
| `blocks` | continue a forward pass at any block, hold attention outputs |
| `prefix_cache` | share keys and values between rows with the same beginning |
| `state`, `kernels` | evaluate a model quickly and leave it as it came |
| `fingerprint`, `foreign_hooks` | name the exact weights, and the caller's hooks |

`loading` loads models from the package, folders, GGUF files (`gguf`) and the hub onto `devices`,
`own_tokenizer` keeps their tokenizers as they were read; `refusals` says what to do with objects
that are almost a model; `validation` and `weight_checks` try a model before its numbers are
believed; `batching` divides work so that it fits into memory. May import: `base`, `display`,
`organism`.
"""
