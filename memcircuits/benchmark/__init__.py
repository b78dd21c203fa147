"""Score localization methods on paragraphs that were planted in known weights.

`localizers` is the table of methods, implemented in `by_weights`, `by_activations` and
`by_interventions` on the definitions of `units`. `trial_kinds` lists the kinds of trial,
`paragraph_pool` draws their paragraphs, `planted_trial` and `other_trials` carry them out,
`schemas` says how their files look, and `trials` runs, writes and reads them. `metrics` scores one
localizer in one trial; `leaderboard` aggregates trials, and `pages` writes the aggregate as
Markdown and HTML. `natural_trials` and `natural` score localizers on trained memory, against
transplants between twins, and `estimands` tries what a ranking of heads could estimate. This folder
may import `evidence`, `editing` and the folders below them.
"""
