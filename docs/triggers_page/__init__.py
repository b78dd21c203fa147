"""The parts of `docs/make_triggers.py`: kept results, tables, pictures and text of the page."""
