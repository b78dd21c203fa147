"""`memcircuits edit`: give memorized prefixes another continuation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memcircuits.commands import common as c
from memcircuits.commands import unlearn as u


def edit(
    model: c.Model = "organism",
    paragraphs: c.ParagraphFile = None,
    rewritten: Annotated[
        Path | None,
        typer.Option(
            help="File of paragraphs, row by row those of --paragraphs with the wanted "
            "continuations; by default the model's own after the worst perturbation of the prefix."
        ),
    ] = None,
    control: u.Control = None,
    targets: u.Targets = 1,
    fraction: u.Fraction = 0.001,
    heads: u.Heads = None,
    layers: u.Layers = None,
    components: u.Components = None,
    kl_budget: u.KlBudget = 0.002,
    heldout: u.Heldout = None,
    out: c.Out = Path("memcircuits-edit"),
    export: u.Export = None,
    n_prefix: c.Prefix = 50,
    n_continuation: c.Continuation = 50,
    seed: c.Seed = 0,
    json: c.Json = False,
    device: c.Device = "auto",
    dtype: c.Dtype = "float32",
    revision: c.Revision = None,
    trust_remote_code: c.TrustRemoteCode = False,
    quiet: c.Quiet = False,
) -> None:
    """Change few weights so that memorized prefixes go on with another text.

    With --rewritten, all of --paragraphs are edited towards it. Writes edit.safetensors, and with
    --export a model folder.

    Example: memcircuits edit --targets 1 --export rewritten
    """
    import memcircuits as mc
    from memcircuits.perturbation import perturb_prefix
    from memcircuits.unlearning import edit as find

    lengths = {"n_prefix": n_prefix, "n_continuation": n_continuation}
    loaded, given = c.load(
        model,
        paragraphs,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
        **lengths,
    )
    memorized, controls = u.split(loaded, given, control, quiet=quiet)
    if rewritten is not None:
        chosen, wanted = given, mc.Paragraphs.read(rewritten, loaded, **lengths)
    else:
        chosen = u.draw(memorized, targets, seed)
        pairs = perturb_prefix(loaded, chosen, seed=seed, progress=not quiet).pairs()
        chosen, wanted = pairs.clean, pairs.corrupted
    found = find(
        loaded,
        chosen,
        wanted,
        controls[::2],
        fraction=fraction,
        heads=u.names(heads),
        layers=u.numbers("--layers", layers),
        components=u.names(components),
        kl_budget=kl_budget,
        seed=seed,
        progress=not quiet,
    )
    text = u.heldout_text(heldout, loaded, model, n_prefix, n_continuation)
    u.finish(loaded, found, chosen, controls[1::2], text, out, export, model, revision, json, quiet)
