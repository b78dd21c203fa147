"""Ray, on this machine or a cluster (extra `ray`), for the modules that share work over it."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
from collections.abc import Iterator
from typing import Any

from memcircuits.base.errors import InputError


@contextlib.contextmanager
def ray_session(address: str | None) -> Iterator[Any]:
    """Ray, started if it is not running, with errors of workers as `InputError`.

    Args:
        address: a cluster; by default Ray is started on this machine and stopped afterwards.

    Raises:
        InputError: if Ray is missing or cannot be reached, and what a worker raises.
    """
    ray = import_ray()
    starts_ray = not ray.is_initialized()
    if address:
        _check_address(address)
    if starts_ray:
        _start(ray, address)
    try:
        yield ray
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, InputError):
            raise cause from None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else ""
        raise InputError("engine", "ray: a worker failed", reason) from error
    finally:
        if starts_ray:
            ray.shutdown()


def import_ray() -> Any:
    """Ray.

    Raises:
        InputError: if it is not installed.
    """
    # Before the import: Ray sends usage statistics unless told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray: Any = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError:
        raise InputError(
            "engine", "ray", "it is not installed; pip install 'memcircuits[ray]'"
        ) from None
    return ray


def _check_address(address: str) -> None:
    """Raise `InputError` if nothing listens there; Ray itself would try for many minutes."""
    if address == "auto":  # Ray looks for a cluster that this machine belongs to
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            "ray_address", address, f"no cluster was reached ({error}); give HOST:PORT or auto"
        ) from None


def _start(ray: Any, address: str | None) -> None:
    if address:
        options: dict[str, Any] = {"address": address}
    else:
        options = {"address": "local", "include_dashboard": False}
    try:
        ray.init(**options, log_to_driver=False, logging_level="error")
    except Exception as error:  # Ray raises many types, also when a node does not start in time
        failure = "no cluster was reached" if address else "Ray did not start"
        raise InputError("ray_address", address, f"{failure} ({error})") from None
