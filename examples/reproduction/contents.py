"""Contents of the page: the figures and tables of the paper, and what shows each of them here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """A figure or table of the paper or of the authors' notebooks.

    Attributes:
        item: where it stands.
        paper: what the paper says or shows.
        function: what measures it here.
        experiment: name of the experiment whose section shows it.
    """

    item: str
    paper: str
    function: str
    experiment: str


CONTENTS = (
    Entry("section 3", "442 memorized paragraphs; 12,422 others; filters", "scan", "sets"),
    Entry("figure 2", "EM and NLL against occurrences in training", "scan", "duplication"),
    Entry("figure 3", "EM lost per replaced token: 12.19, others 33.12", "perturb_prefix",
          "perturbation"),
    Entry("figure 4", "map of gradients; lower half 29, 40, 54, 59 %", "parameter_gradients",
          "gradients"),
    Entry("figure 9", "sum, variance, maximum, minimum; attention and MLP by layer",
          "ParameterGradients.component_statistics, layer_sums", "gradient-statistics"),
    Entry("equation 3", "maps of the contrastive objectives; L1H2", "contrastive_gradients",
          "contrast"),
    Entry("figure 5", "EM after unlearning 26.75, editing 33.65; histograms", "unlearn, edit",
          "fine-tuning"),
    Entry("figure 10", "gradients of activations, memorized and others", "activation_gradients",
          "activation-gradients"),
    Entry("figure 6", "gradients at the perturbed and the first impacted token",
          "activation_gradients(token=)", "perturbed-gradients"),
    Entry("figures 6, 7", "attention and frequency rank -0.97; an example",
          "rare_token_attention", "rare-tokens"),
    Entry("appendix", "Kendall by token type; entropy of the heads", "rare_token_attention",
          "token-types"),
    Entry("appendix", "patching of heads in both directions", "patch_heads", "patching"),
    Entry("appendix", "attention and MLP outputs; layer x position", "patch_layers",
          "layer-patching"),
    Entry("appendix", "head x prefix position", "patch_heads(positions=)", "position-patching"),
    Entry("notebook", "cosine maps of gradients and activations",
          "contrastive_gradients, activation_gradients", "cosine-maps"),
    Entry("notebook", "noise on the weights with the largest gradients", "weight_noise", "noise"),
    Entry("notebooks", "two largest logits, Min-K %, second choices", "scan, perturb_prefix",
          "description"),
)  # fmt: skip


def contents(done: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row for each entry, with its state: shown, in part (a row could not be had), or not."""
    parts = {part["name"]: part for part in done}
    rows = []
    for entry in CONTENTS:
        part = parts.get(entry.experiment)
        section, state = "", "not run"
        if part is not None:
            had = [finding["ours"] is not None for finding in part["findings"]]
            state = "shown" if all(had) else "in part" if any(had) else "not had"
            section = f"{part['title']} ({len(part['charts'])} figures)"
        rows.append(
            {
                "where": entry.item,
                "in the paper": entry.paper,
                "state": state,
                "on this page": section,
                "function": entry.function,
            }
        )
    return rows
