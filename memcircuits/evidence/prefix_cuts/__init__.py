"""What if a prefix is cut inside a token? `cut_prefix` measures what is still recited.

`cuts` is the measurement, `covering` finds the token sequences that spell a cut prefix, `decoding`
follows the text of greedy decoding byte by byte, and `result` holds the numbers.
"""
