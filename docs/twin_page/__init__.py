"""The parts of `docs/make_twin.py`: measurements, and the text of the page."""
