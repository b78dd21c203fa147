"""Can the recitation be removed, or written? Sparse changes of weights.

* The result: `masks` are sets of weights, `edit` is a change of them that can be applied, saved
  and taken back, `export` writes the edited model as a folder.
* Finding a change: `optimization` is the loop that minimises an `objective`. `unlearning` minimises
  `unlearning_objective` by a `recipe`, with the `curvature` of controls, in masks chosen by
  `edit_search`. `planting` writes paragraphs (`placement` says where) by `planting_objective`.
* What a change did: `evaluation` (an `edit_report`), `relearning` and `noise`. `audits` compare an
  edit with a model that never saw the text (`references`), also from `attacks` on the prefix.

May import: `measure` and below; not `evidence`.
"""
