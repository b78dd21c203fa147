"""The parts of `docs/make_unlearning.py`: settings, runs, tables, plot and text of the page."""
