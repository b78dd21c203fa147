"""Which paragraphs does a language model recite, and which of its parts does that depend on?

The folders, from the lowest layer to the highest; each imports only from those above it in this
table (docs/architecture.md):

| folder | what it holds |
| --- | --- |
| `base` | errors, names of heads, files, progress bars, statistics: nothing knows a model |
| `organism` | the small model that ships with the package, and its training paragraphs |
| `display` | how numbers and text look: plotly figures, offline HTML pages |
| `models` | TransformerLens behind one interface, checked by trying it |
| `data` | files become paragraphs: a prefix and a continuation in token ids |
| `results` | what every analysis returns: typed, saved, with its provenance |
| `measure` | what is recited: EM, NLL and gradients, of paragraphs and whole corpora |
| `evidence` | what it depends on: ablation, gradients, attention, patching, triggers; the ranking |
| `editing` | can it be removed: sparse edits of weights, their effects, planted paragraphs |
| `report` | the page of a ranking |
| `benchmark` | does a method find the right place: planted paragraphs as ground truth |
| `organism_build` | how the shipped model was trained |
| `commands` | one file per command of the command line, which `cli` joins |

The public names of this module are imported when they are first used, so that
`import memcircuits` and `memcircuits --help` are quick: `__init__.pyi` says where each one is.
`memcircuits.figures` and `memcircuits.pages` are the public names of `display`.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
