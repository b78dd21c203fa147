"""Which neurons write the next token, and which heads call them? Context look-ups.

`writing` finds what neurons add to the logits, `driving` which heads set a neuron off and what it
does without one, `measure` puts both together, and `results` holds them. May import: `measure` and
below.
"""
