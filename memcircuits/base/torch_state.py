"""The state of torch itself, which a caller may have changed for work of another kind.

Inside `torch.inference_mode()` no gradients exist, and the tensors made there never have any.
Autocast computes in another type than the model's. Another default type or device changes what the
tensors made on the way are. None of this belongs to a measurement, so public functions that run a
model are decorated by `plain_torch`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, torch is as it is when a program starts, whatever the caller has switched on.

    No inference mode, no autocast, new tensors in float32 and on the CPU; gradients are computed
    for what requires them. TensorFloat-32 and deterministic algorithms stay as the caller has set
    them.
    """
    default = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, default)
        torch.set_default_dtype(torch.float32)
        yield
