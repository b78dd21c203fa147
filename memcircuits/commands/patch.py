"""`memcircuits patch`: which activations carry the recitation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memcircuits.commands import common as c
from memcircuits.commands.selection import draw, names, numbers

if TYPE_CHECKING:
    from memcircuits.data.paragraphs import Paragraphs
    from memcircuits.evidence.patching.results import LayerPatches, PatchMap


def patch(
    source: c.Source,
    corrupted: Annotated[
        Path | None,
        typer.Option(
            help="File of perturbed twins of --paragraphs, row by row; by default the most "
            "destructive single replacements in the memorized paragraphs."
        ),
    ] = None,
    site: Annotated[
        str,
        typer.Option(
            help="Heads: q, k, v, z, pattern; layers: resid_pre, resid_mid, attn_out, mlp_out; "
            "several with commas."
        ),
    ] = "q,k,v,z",
    direction: Annotated[str, typer.Option(help="noising, denoising or both.")] = "both",
    metric: Annotated[
        str, typer.Option(help="first_impacted, nll, logit_diff or em.")
    ] = "first_impacted",
    method: Annotated[str, typer.Option(help="Heads: exact or attribution.")] = "exact",
    positions: Annotated[
        str, typer.Option(help="Heads are patched at: changed, all, or positions like 0,7.")
    ] = "changed",
    draws: Annotated[
        int, typer.Option(min=1, help="Random replacements tried per position for the twins.")
    ] = 1,
    max_paragraphs: Annotated[int, typer.Option(min=1, help="At most so many pairs.")] = 20,
    top: Annotated[int, typer.Option(min=1, help="Rows of each table printed.")] = 5,
    out: c.Out = Path("memcircuits-patch"),
    seed: c.Seed = 0,
    json: c.Json = False,
) -> None:
    """Move activations between a paragraph and its perturbed twin, one at a time.

    The twin is the same paragraph with a prefix token replaced. Noising puts the twin's activation
    into the paragraph's run, denoising the other way round; printed is what that changes, and which
    share of the way to the other run it goes. Writes a result per site and direction, and maps.

    Example: memcircuits patch --site q,z,resid_pre --direction denoising
    """
    from memcircuits.core.errors import InputError, one_of
    from memcircuits.evidence.patching.context import DIRECTIONS
    from memcircuits.evidence.patching.metrics import METRIC_UNITS
    from memcircuits.evidence.patching.sites import LAYER_SITES, PATCH_HEAD_SITES
    from memcircuits.evidence.patching.sweeps import patch_heads, patch_layers

    sites = names(site) or []
    for one in sites:
        one_of("--site", one, (*PATCH_HEAD_SITES, *LAYER_SITES))
        if method != "exact" and one in LAYER_SITES:
            raise InputError("--method", method, f"{one}: layers are patched exactly; leave it out")
    one_of("--direction", direction, (*DIRECTIONS, "both"))
    one_of("--metric", metric, METRIC_UNITS)
    one_of("--method", method, ("exact", "attribution"))
    where: str | list[int] | None = positions
    if positions == "all":
        where = None
    elif positions != "changed":
        if not positions.replace(",", "").replace(" ", "").isdigit():
            raise InputError("--positions", repr(positions), "write changed, all or like 0,7")
        where = numbers("--positions", positions)
    loaded, given = source.load()
    clean, twins = _pairs(source, loaded, given, corrupted, max_paragraphs, draws, seed)
    results: dict[tuple[str, str], PatchMap | LayerPatches] = {}
    for way in DIRECTIONS if direction == "both" else (direction,):
        options: dict[str, Any] = {"metric": metric, "direction": way, "progress": not source.quiet}
        head_options = {"positions": where, "method": method, "seed": seed, **options}
        for one in sites:
            c.say(f"{way} {one}, {len(clean)} pairs", source.quiet)
            if one in PATCH_HEAD_SITES:
                results[way, one] = patch_heads(loaded, clean, twins, site=one, **head_options)
            else:
                options["site"] = one
                results[way, one] = patch_layers(loaded, clean, twins, **options)
    written = _write(results, out)
    if json:
        c.print_json([_facts(way, one, result) for (way, one), result in results.items()])
    else:
        for result in results.values():
            frame = result.to_frame().sort_values("share", ascending=False, kind="stable")
            name = next(iter(result.samples))
            typer.echo(
                f"{result.name} over {len(clean)} pairs, changes of {name} [{result.units}] and "
                f"others; unpatched {float(result.base[name].mean()):.4g}, the other run "
                f"{float(result.source[name].mean()):.4g}, share: how much of the way there"
            )
            c.print_table(frame.head(top))
            for note in result.notes:
                typer.echo(f"Note: {note}")
    for path in written:
        c.say(f"wrote {path}", source.quiet)


def _pairs(
    source: c.Source,
    model: Any,
    given: Paragraphs,
    corrupted: Path | None,
    most: int,
    draws: int,
    seed: int,
) -> tuple[Paragraphs, Paragraphs]:
    from memcircuits.core.errors import InputError
    from memcircuits.evidence.triggers.perturbation import perturb_prefix
    from memcircuits.measure.scanning import scan

    if corrupted is not None:
        return given[:most], source.read(corrupted, model)[:most]
    memorized = scan(model, given, progress=not source.quiet).memorized
    if memorized is None:
        raise InputError(
            "--paragraphs", f"none of {len(given)} is memorized", "pass --corrupted with twins"
        )
    chosen = draw(memorized, most, seed)
    c.say(f"perturbing {len(chosen)} memorized paragraphs", source.quiet)
    return perturb_prefix(model, chosen, draws=draws, seed=seed, progress=not source.quiet).pairs()


def _facts(way: str, site: str, result: PatchMap | LayerPatches) -> dict[str, Any]:
    name = next(iter(result.samples))
    facts = {
        "direction": way,
        "site": site,
        "metric": name,
        "units": result.units,
        "base": float(result.base[name].mean()),
        "source": float(result.source[name].mean()),
        "effects": c.records(result.to_frame()),
        "notes": list(result.notes),
    }
    agreement = getattr(result, "agreement", {})
    if agreement:
        facts["agreement"] = {k: v if v == v else None for k, v in agreement.items()}
    return facts


def _write(results: dict[tuple[str, str], PatchMap | LayerPatches], out: Path) -> list[Path]:
    from memcircuits.core.io import write_atomically
    from memcircuits.display import figures
    from memcircuits.evidence.patching.results import PatchMap

    written = [
        result.save(out / f"patch-{way}-{site}.safetensors")
        for (way, site), result in results.items()
    ]
    for way in dict.fromkeys(way for way, _ in results):
        for column in ("head", "position"):
            maps = {
                site: result
                for (w, site), result in results.items()
                if w == way and isinstance(result, PatchMap) == (column == "head")
            }
            widths = {result.values.shape[1] for result in maps.values()}
            for width in widths:  # key-value heads have a map of their own
                panels = {s: r.values for s, r in maps.items() if r.values.shape[1] == width}
                first = next(iter(maps.values()))
                figure = figures.patching_map(
                    panels,
                    title=f"{way}: {next(iter(first.samples))}",
                    name="effect",
                    units=first.units,
                    col_label=column,
                )
                name = f"patch-{way}-{'-'.join(panels)}.html"
                written.append(write_atomically(out / name, figure.to_html(include_plotlyjs=True)))
    return written
