"""The figures as `memcircuits.figures`: see `memcircuits.display.figures`."""

from memcircuits.display.figures import *  # noqa: F403
from memcircuits.display.figures import __all__ as __all__
