"""The report of a ranking: one offline page, and the commands that make it again.

May import: `evidence` and below.
"""
