"""Pages and their blocks as `memcircuits.pages`: see `memcircuits.display.pages`."""

from memcircuits.display.pages import *  # noqa: F403
from memcircuits.display.pages import __all__ as __all__
