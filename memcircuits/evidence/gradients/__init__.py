"""Gradients of the continuation's loss (section 4 of the paper).

`parameters` takes them for the weights (equation 2), `contrastive` for the weights against controls
(equation 3), `activations` for queries, keys, values, z and the MLP's hidden layer. `pooling` turns
the gradient of a weight matrix into a few numbers per head. May import: `measure` and below.
"""
