"""The parts of `examples/reproduce_paper.py`: study, experiments, statistics and page."""
