from .base.errors import InputError
from .base.heads import Head
from .data.paragraphs import Paragraphs
from .data.unigrams import UnigramTable
from .editing.audits.audit import audit_edit
from .editing.planting import plant
from .editing.rewriting import edit
from .editing.unlearning import unlearn
from .evidence.ablation import ablate_heads
from .evidence.attention_view import attention_view
from .evidence.circuits.circuit import recitation_circuit
from .evidence.comparisons.compare import compare
from .evidence.contrasts.contrast import contrast
from .evidence.counterfactual import counterfactual
from .evidence.find_components import find_memorization_components, find_memorization_heads
from .evidence.formation import formation
from .evidence.gradients.activations import activation_gradients
from .evidence.gradients.contrastive import contrastive_gradients
from .evidence.gradients.parameters import parameter_gradients
from .evidence.influence import influence
from .evidence.lookups.measure import lookups
from .evidence.patching.sweeps import patch_heads
from .evidence.prefix_cuts.cuts import cut_prefix
from .evidence.rare_tokens import rare_token_attention
from .evidence.subnetworks.core import core
from .evidence.transplants.sweep import transplant
from .evidence.triggers.perturbation import perturb_prefix
from .measure.document.mapping import document_map
from .measure.sampling import Sampler
from .measure.scanning import scan
from .models.loading import load_model

__version__: str

__all__ = [
    "Head",
    "InputError",
    "Paragraphs",
    "Sampler",
    "UnigramTable",
    "__version__",
    "ablate_heads",
    "activation_gradients",
    "attention_view",
    "audit_edit",
    "compare",
    "contrast",
    "contrastive_gradients",
    "core",
    "counterfactual",
    "cut_prefix",
    "document_map",
    "edit",
    "find_memorization_components",
    "find_memorization_heads",
    "formation",
    "influence",
    "load_model",
    "lookups",
    "parameter_gradients",
    "patch_heads",
    "perturb_prefix",
    "plant",
    "rare_token_attention",
    "recitation_circuit",
    "scan",
    "transplant",
    "unlearn",
]
