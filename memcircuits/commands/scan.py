"""`memcircuits scan`: which paragraphs are recited."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from memcircuits.commands import common as c

if TYPE_CHECKING:
    import pandas as pd


def scan(
    model: c.Model = "organism",
    paragraphs: c.ParagraphFile = None,
    n_prefix: c.Prefix = 50,
    n_continuation: c.Continuation = 50,
    json: c.Json = False,
    device: c.Device = "auto",
    dtype: c.Dtype = "float32",
    revision: c.Revision = None,
    trust_remote_code: c.TrustRemoteCode = False,
    batch_size: c.BatchSize = None,
    quiet: c.Quiet = False,
) -> None:
    """Which paragraphs does the model recite? EM, NLL and margins of every one.

    Example: memcircuits scan --model EleutherAI/gpt-neo-125m --paragraphs 50_50_preds.pt
    """
    import memcircuits as mc

    loaded, given = c.load(
        model,
        paragraphs,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        n_prefix=n_prefix,
        n_continuation=n_continuation,
        quiet=quiet,
    )
    found = mc.scan(loaded, given, batch_size=batch_size, progress=not quiet)
    frame = found.to_frame()
    groups = _summary(frame)
    if json:
        c.print_json(
            {"summary": groups, "n_continuation": n_continuation, "paragraphs": c.records(frame)}
        )
        return
    c.print_table(frame.drop(columns="finite"))
    for name, group in groups.items():
        typer.echo(
            f"{name}: {group['n']} paragraphs, {group['memorized']} memorized, "
            f"mean EM {group['em']:.2f}, mean NLL {group['nll']:.3f} nats/token"
        )


def _summary(frame: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Counts and means over all paragraphs and, where known, per role."""
    groups = {"all": frame}
    if "role" in frame:
        groups |= dict(iter(frame.groupby("role")))
    return {
        str(name): {
            "n": len(group),
            "memorized": int(group["memorized"].sum()),
            "em": float(group["em"].mean()),
            "max_em": int(group["em"].max()),
            "nll": float(group["nll"].mean()),
        }
        for name, group in groups.items()
    }
