"""The commands of the command line, a module each; `memcircuits.cli` assembles them.

Heavy packages are imported inside the commands, so that `memcircuits --help` is quick.
"""
