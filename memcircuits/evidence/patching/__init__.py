"""Activation patching between a clean and a corrupted run, exact or to first order (appendix).

`sweeps` holds the two public measurements, `patch_heads` and `patch_layers`; `results` what they
return. Below them: `context` (the two runs that are compared), `metrics` (what is measured on the
clean continuation), `sites` (what can be patched), `exact` and `attribution` (the two methods).
"""
