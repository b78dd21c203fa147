"""What every other folder uses; nothing here knows a model, a paragraph or a result.

`errors` (one-line errors and argument checks), `heads` (the name of a head), `io` (files that
appear whole or not at all), `json_values` (JSON of any value), `progress` (bars on stderr),
`statistics` (bootstrap, permutation, Benjamini-Hochberg). May import: nothing of the package.

One exception: the public function `memcircuits.core` has the name of this folder, and Python gives
that name to the folder as soon as one of its modules is imported. So the folder can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallableFolder(ModuleType):
    """This folder, which is also `memcircuits.core(model, memorized, control)`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """See `memcircuits.evidence.subnetworks.core.core`."""
        from memcircuits.evidence.subnetworks.core import core

        return core(*args, **options)


sys.modules[__name__].__class__ = _CallableFolder
