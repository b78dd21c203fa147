"""Activation patching between a clean and a corrupted run, exact or to first order (appendix).

`sweeps` holds two public measurements, `patch_heads` and `patch_layers`, and `neurons` a third,
`patch_neurons`; `results` is what they return. Below them: `context` (the two runs that are
compared), `metrics` (what is measured on the clean continuation), `sites` (what can be patched),
`exact` and `attribution` (the two methods).
"""
