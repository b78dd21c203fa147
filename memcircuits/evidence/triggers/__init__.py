"""Prefix tokens that trigger the recitation: perturbation and minimal sets (section 4.2).

`perturbation` replaces every prefix token in turn and measures what is still recited;
`minimal_sets` searches the smallest sets of tokens that stop and that start a recitation. Below
them: `replacements` (which tokens are put in), `scoring` (EM and NLL of every replacement), `pairs`
(clean and corrupted paragraphs for patching) and `regression` (why a token matters).
"""
