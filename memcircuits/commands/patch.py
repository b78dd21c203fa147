"""`memcircuits patch`: which activations carry the recitation from a clean to a corrupted run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from memcircuits.commands.inputs import Inputs
from memcircuits.commands.options import Json, Out, Seed, Top, existing
from memcircuits.commands.output import Answer, print_notes, print_table, say, say_written
from memcircuits.commands.selection import choice, draw, memorized_only, names, numbers

if TYPE_CHECKING:
    from memcircuits.data.paragraphs import Paragraphs
    from memcircuits.evidence.patching.results import LayerPatches, PatchMap

    Patches: TypeAlias = PatchMap | LayerPatches
    PatchesOf: TypeAlias = dict[tuple[str, str], Patches]
    """By direction and site."""


@dataclass(frozen=True)
class PatchOptions:
    """What is patched, where, and what is measured."""

    corrupted: Annotated[
        Path | None,
        typer.Option(
            callback=existing,
            help="File of corrupted versions of --paragraphs, row by row; by default, the most "
            "destructive single replacements in the memorized paragraphs.",
        ),
    ] = None
    site: Annotated[
        str,
        typer.Option(
            help="Heads: q, k, v, z, pattern; layers: resid_pre, resid_mid, attn_out, mlp_out; "
            "groups of neurons: neurons; several with commas."
        ),
    ] = "q,k,v,z"
    direction: Annotated[
        Literal["noising", "denoising", "both"], typer.Option(help="Which run is patched.")
    ] = "both"
    metric: Annotated[
        Literal["first_impacted", "nll", "logit_diff", "em"], typer.Option(help="What is compared.")
    ] = "first_impacted"
    method: Annotated[
        Literal["exact", "attribution"], typer.Option(help="For heads; layers are patched exactly.")
    ] = "exact"
    positions: Annotated[
        str,
        typer.Option(help="Positions where heads are patched: changed, all, or a list like 0,7."),
    ] = "changed"
    draws: Annotated[
        int,
        typer.Option(min=1, help="Number of random replacements tried per position to corrupt."),
    ] = 1
    max_paragraphs: Annotated[int, typer.Option(min=1, help="Maximum number of pairs.")] = 20
    seed: Seed = 0

    def check(self) -> None:
        """Raise `InputError` for what can be refused before a model is loaded."""
        from memcircuits.base.errors import InputError
        from memcircuits.evidence.patching.sites import LAYER_SITES, PATCH_HEAD_SITES

        for site in self.sites:
            choice("--site", site, (*PATCH_HEAD_SITES, *LAYER_SITES, "neurons"))
            if self.method != "exact" and site not in PATCH_HEAD_SITES:
                raise InputError(
                    "--method", self.method, f"{site}: only heads can be estimated; leave it out"
                )
        self.parsed_positions  # noqa: B018 - raises for what is no list

    def check_positions(self, n_patched: int) -> None:
        """Raise `InputError` if positions lie behind those that can be patched."""
        from memcircuits.base.errors import InputError

        positions = self.parsed_positions
        if isinstance(positions, list) and max(positions) >= n_patched:
            remedy = f"give positions from 0 to {n_patched - 1}"
            raise InputError("--positions", max(positions), remedy)

    @property
    def sites(self) -> list[Any]:
        """The sites, one by one; `check` refuses other words."""
        return names(self.site) or []

    @property
    def directions(self) -> tuple[str, ...]:
        """One direction or both."""
        from memcircuits.evidence.patching.context import DIRECTIONS

        return tuple(DIRECTIONS) if self.direction == "both" else (self.direction,)

    @property
    def parsed_positions(self) -> Any:
        """The positions as `patch_heads` takes them."""
        from memcircuits.base.errors import InputError

        if self.positions in ("changed", "all"):
            return "changed" if self.positions == "changed" else None
        if not self.positions.replace(",", "").replace(" ", "").isdigit():
            raise InputError("--positions", repr(self.positions), "write changed, all or like 0,7")
        return numbers("--positions", self.positions)


def patch(
    inputs: Inputs,
    options: PatchOptions,
    top: Top = 5,
    out: Out = Path("memcircuits-patch"),
    json: Json = False,
) -> None:
    """Copy activations between a paragraph and its corrupted version, one at a time.

    The corrupted version is the same paragraph with a prefix token replaced. Noising copies its
    activation into the clean run, denoising copies the clean one into the corrupted run. Printed
    are the effect, and its share of the difference between both runs. Writes a result per site and
    direction, and maps.

    Example: memcircuits patch --site q,z,resid_pre --direction denoising
    """
    options.check()
    model, paragraphs = inputs.load(paired=options.corrupted is not None)
    options.check_positions(paragraphs.ids.shape[1] - 1)
    clean, corrupted = _pairs(inputs, model, paragraphs, options)
    results = _measure(inputs, model, clean, corrupted, options)
    written = [
        result.save(out / f"patch-{direction}-{site}.safetensors")
        for (direction, site), result in results.items()
    ]
    written += _write_maps(results, out)
    if json:
        _answer(results, len(clean), written).print_json()
    else:
        for result in results.values():
            _print(result, len(clean), top)
    say_written(written, inputs.quiet)


def _pairs(
    inputs: Inputs, model: Any, paragraphs: Paragraphs, options: PatchOptions
) -> tuple[Paragraphs, Paragraphs]:
    """Clean paragraphs and their corrupted versions, row by row."""
    from memcircuits.evidence.triggers.perturbation import perturb_prefix

    n = options.max_paragraphs
    if options.corrupted is not None:
        corrupted = inputs.read(options.corrupted, model, "--corrupted", strict=True)
        return paragraphs[:n], corrupted[:n]
    chosen = draw(memorized_only(inputs, model, paragraphs), n, options.seed)
    say(f"perturbing {len(chosen)} memorized paragraphs", inputs.quiet)
    clean, corrupted = perturb_prefix(
        model, chosen, draws=options.draws, seed=options.seed, progress=inputs.progress
    ).pairs()
    return clean, corrupted


def _measure(
    inputs: Inputs, model: Any, clean: Paragraphs, corrupted: Paragraphs, options: PatchOptions
) -> PatchesOf:
    """Patch every site in every direction."""
    from memcircuits.evidence.patching.neurons import patch_neurons
    from memcircuits.evidence.patching.sites import PATCH_HEAD_SITES
    from memcircuits.evidence.patching.sweeps import (
        attribution_patching,
        patch_heads,
        patch_layers,
    )

    results: PatchesOf = {}
    for direction in options.directions:
        shared: dict[str, Any] = {"direction": direction, "metric": options.metric}
        shared |= {"progress": inputs.progress}
        of_heads = shared | {"positions": options.parsed_positions, "seed": options.seed}
        say(f"{direction} {', '.join(options.sites)}, {len(clean)} pairs", inputs.quiet)
        if options.method == "attribution":
            maps = attribution_patching(model, clean, corrupted, sites=options.sites, **of_heads)
            results |= {(direction, site): result for site, result in maps.items()}
            continue
        for site in options.sites:
            pair = (model, clean, corrupted)
            if site == "neurons":
                neurons = shared | {"positions": options.parsed_positions}
                results[direction, site] = patch_neurons(*pair, **neurons)
            elif site in PATCH_HEAD_SITES:
                results[direction, site] = patch_heads(*pair, site=site, **of_heads)
            else:
                results[direction, site] = patch_layers(*pair, site=site, **shared)
    return results


def _print(result: Patches, n_pairs: int, top: int) -> None:
    frame = result.to_frame().sort_values("share", ascending=False, kind="stable")
    metric = next(iter(result.samples))
    typer.echo(
        f"{result.name} over {n_pairs} pairs, changes of {metric} [{result.units}] and others; "
        f"unpatched {float(result.base[metric].mean()):.4g}, the other run "
        f"{float(result.source[metric].mean()):.4g}; share: fraction of that difference"
    )
    print_table(frame.head(top))
    print_notes(result.notes)


def _answer(results: PatchesOf, n_pairs: int, written: list[Path]) -> Answer:
    """All effects in one table, and what is compared in another."""
    import pandas as pd

    runs, effects = [], []
    for (direction, site), result in results.items():
        metric = next(iter(result.samples))
        place = {"direction": direction, "site": site}
        base, source = float(result.base[metric].mean()), float(result.source[metric].mean())
        runs.append(
            {**place, "metric": metric, "units": result.units, "base": base, "source": source}
        )
        runs[-1] |= getattr(result, "agreement", {})
        effects.append(result.to_frame().assign(**place))
    first = next(iter(results.values()))
    return Answer(
        "patch",
        summary=f"activations patched over {n_pairs} pairs, one at a time",
        values={"pairs": n_pairs},
        tables={"runs": pd.DataFrame(runs), "effects": pd.concat(effects, ignore_index=True)},
        notes=dict.fromkeys(note for result in results.values() for note in result.notes),
        files=written,
        provenance=first.provenance,
    )


def _write_maps(results: PatchesOf, out: Path) -> list[Path]:
    """A page per direction and axis: heads, key-value heads if fewer, positions, neuron groups."""
    written = []
    for direction in dict.fromkeys(direction for direction, _ in results):
        by_axis: dict[str, dict[str, Patches]] = {}
        for (other, site), result in results.items():
            if other == direction:
                by_axis.setdefault(getattr(result, "axis", "position"), {})[site] = result
        for axis, panels in by_axis.items():
            written.append(_write_map(direction, panels, axis.replace("_", "-"), out))
    return written


def _write_map(direction: str, panels: dict[str, Patches], column: str, out: Path) -> Path:
    from memcircuits.base.io import write_atomically
    from memcircuits.display import figures

    first = next(iter(panels.values()))
    figure = figures.patching_map(
        {site: result.values for site, result in panels.items()},
        title=f"{direction}: {next(iter(first.samples))}",
        name="effect",
        units=first.units,
        col_label=column,
    )
    path = out / f"patch-{direction}-{'-'.join(panels)}.html"
    return write_atomically(path, figure.to_html(include_plotlyjs=True))
