"""Pages and their blocks as `memcircuits.pages`: see `memcircuits.display.pages`."""

from typing import TYPE_CHECKING

from memcircuits.display.pages import __all__ as __all__

if TYPE_CHECKING:
    from memcircuits.display.pages import *  # noqa: F403
else:
    from memcircuits.display.pages import __getattr__ as __getattr__  # imported when first used
