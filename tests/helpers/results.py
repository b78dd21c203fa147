"""Every kind of result that the package defines."""

from __future__ import annotations

import importlib
import pkgutil

from memcircuits.results.result import Result


def result_types() -> dict[str, type[Result]]:
    """Kind -> type, of all modules that define results."""
    for folder in ("results", "measure", "evidence", "editing"):
        package = importlib.import_module(f"memcircuits.{folder}")
        for module in pkgutil.walk_packages(package.__path__, f"memcircuits.{folder}."):
            if not module.name.endswith("on_ray"):  # needs an extra, and defines none
                importlib.import_module(module.name)
    return {
        kind: cls for kind, cls in Result.types.items() if cls.__module__.startswith("memcircuits.")
    }
