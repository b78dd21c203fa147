"""Where did training write a paragraph? Components of one model, put into its twin.

`components` says what is transplanted: heads and their halves, MLPs, neurons, layers. `weights`
moves their weights, `activations` their activations; `sweep` does so for all components in both
directions, and `results` holds the effects. May import: `evidence.interventions`, `measure` and
below.
"""
