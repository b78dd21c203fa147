"""Which tokens of the prefix trigger the recitation? Perturbation and minimal sets (section 5.1)."""
