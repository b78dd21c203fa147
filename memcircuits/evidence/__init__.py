"""What does the recitation depend on? One file or folder for each kind of evidence.

* Interventions: `interventions` carries out `activation_edits` in the middle of a forward pass;
  `ablation` takes components out (`component_edits` says how), `patching` moves activations between
  prompts, `subnetworks` takes out all but a few.
* The ranking: `find_components` puts together what `groups` (with the controls of `controls`),
  `component_effects` (with `component_grid`, `screening` and `levels`), `component_scores` and
  `further_evidence` give; `ranking` is the result.
* Paths: `circuits` finds the edges between components that carry one recitation.
* Further evidence about one model: `gradients`, `rare_tokens`, `triggers`, `prefix_cuts`,
  `lookups`, `contrasts`, `influence`; `direct_writes` says what components add to the logits by
  themselves, and `attention_view` shows what heads attend to.
* Two models or more: `comparisons`, `counterfactual`, `transplants` and `formation` compare a model
  with another or follow it over training; `recitation_kinds` sorts recitations.

May import: `measure` and below; not `editing`.
"""
