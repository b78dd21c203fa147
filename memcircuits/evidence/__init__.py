"""Where does the recitation live? One file or folder for each kind of evidence.

`interventions` changes activations in the middle of a forward pass. `ablation`, `screening`,
`rare_tokens`, `gradients`, `triggers`, `prefix_cuts`, `patching`, `lookups` and `subnetworks`
measure one model; `comparisons`, `counterfactual`, `transplants` and `formation` compare it with
another or follow it over training. `direct_writes` says what components add to the logits by
themselves. `groups` chooses the paragraphs to compare, `find_heads` puts the evidence about heads
together into a `ranking`, and `attention_view` shows what heads attend to. May import: `measure`
and below; not `editing`.
"""
