"""TransformerLens behind one interface: the only folder that knows model classes and architectures.

`registry.adapt(model)` gives the `adapter.Adapter` that all analyses take; `loading` gets models
from the package, folders, GGUF files and the hub; `validation` tries a model before it is believed;
`batching` fits work into memory. May import: `core`, `display`, `organism`.
"""
