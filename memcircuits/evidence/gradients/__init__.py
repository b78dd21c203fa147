"""Gradients of the continuation's loss: of weights, contrastive, and of activations (section 4)."""
