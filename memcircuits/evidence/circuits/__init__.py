"""Which paths carry the recitation of one paragraph? A circuit of heads, MLPs and edges.

`graph` says which edges there are and which of them lie on a path, `edge_runs` runs the model with
some edges only, `edge_attribution` estimates the effect of every edge, `circuit` puts them
together, and `results` holds the circuit, with `page` as its page. May import: `measure` and below.
"""
