"""The parts of `docs/make_claims.py`: measurements, and sentences that rest on numbers."""
