"""Which paragraphs does a language model recite, and where does that live?

The public names, imported when first used so that `import memcircuits` is quick.

| module | idea |
| --- | --- |
| `adapter`, `validation` | one view of every model class and architecture, checked by trying it |
| `loading` | models from the package, folders, GGUF files and the hub |
| `paragraphs` | token ids, prefix and continuation |
| `formats`, `readers` | file formats; paragraphs out of files |
| `measure`, `scanning` | EM, NLL and margins from one forward pass |
| `corpus_scan`, `ray_scan` | scans of whole corpora to disk, resumed and shared out |
| `engine`, `memory` | forward passes continued in the middle, in pieces that fit |
| `kernels` | the same functions in fewer steps |
| `ablation`, `attention`, `gradients` | the three kinds of evidence about heads |
| `screening` | all heads by attribution, the best ones exactly |
| `ranking` | `find_memorization_heads`: evidence, intervals, p-values |
| `activations` | gradients of activations |
| `perturbation`, `replacements`, `pairs`, `minimal` | trigger tokens of the prefix |
| `patching`, `attribution` | activations moved between two runs, exactly or to first order |
| `unlearning`, `masks`, `edits` | sparse fine-tuning of exactly the chosen weights |
| `curvature` | what a change of weights costs on controls |
| `planting` | paragraphs written into chosen weights: ground truth |
| `localizers`, `localization` | rival ways to find those weights, and their benchmark |
| `evaluation`, `exporting`, `noise` | what an edit did; the edited model as a folder; robustness |
| `unigrams`, `statistics` | token rarity; bootstrap and permutation over paragraphs |
| `results`, `checks`, `progress` | typed results, clear errors, bars |
| `views`, `report`, `figures`, `pages` | what people look at |
| `organism` | the model that ships with the package |
| `cli`, `commands` | the command line |
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Head": "core.heads",
    "InputError": "core.errors",
    "Paragraphs": "data.paragraphs",
    "UnigramTable": "data.unigrams",
    "ablate_heads": "evidence.ablation",
    "activation_gradients": "evidence.gradients.activations",
    "attention_view": "evidence.attention_view",
    "contrastive_gradients": "evidence.gradients.contrastive",
    "edit": "editing.unlearning",
    "find_memorization_heads": "evidence.find_heads",
    "load_model": "models.loading",
    "parameter_gradients": "evidence.gradients.parameters",
    "patch_heads": "evidence.patching.sweeps",
    "perturb_prefix": "evidence.triggers.perturbation",
    "plant": "editing.planting",
    "rare_token_attention": "evidence.rare_tokens",
    "scan": "measure.scanning",
    "unlearn": "editing.unlearning",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"memcircuits.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
