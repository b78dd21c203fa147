"""Write docs/triggers.md, its numbers and its pictures: python docs/make_triggers.py.

Perturbation and activation patching on the shipped model. Needs Chromium for the pictures. Results
are kept in --keep and not computed again, so that the page can be rewritten at once.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import memcircuits as mc
from memcircuits.core.statistics import bootstrap_means, finite_mean
from memcircuits.display import figures
from memcircuits.evidence.patching.context import DIRECTIONS
from memcircuits.evidence.patching.results import LayerPatches, PatchMap
from memcircuits.evidence.patching.sweeps import patch_heads, patch_layers
from memcircuits.evidence.triggers.minimal_sets import MinimalSets, minimal_sets
from memcircuits.evidence.triggers.perturbation import Perturbation, perturb_prefix
from memcircuits.evidence.triggers.replacements import REPLACEMENTS
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.results.result import Result

DOCS = Path(__file__).parent
PICTURES = DOCS / "pictures"
SITES = ("q", "k", "v", "z")
LAYER_SITES = ("attn_out", "mlp_out")
METRICS = ("first_impacted", "logit_diff")
RESAMPLES = 2000
BUDGET = 64 * 2**20  # bytes; batches that stay in the cache of a small processor
Results = dict[tuple[str, str], Perturbation]
Maps = dict[tuple[str, str], PatchMap]
Estimates = dict[tuple[str, str, str], PatchMap]
Layers = dict[tuple[str, str], LayerPatches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--paragraphs", type=int, default=60, help="memorized, and as many controls"
    )
    parser.add_argument("--pairs", type=int, default=12, help="pairs for patching")
    parser.add_argument("--draws", type=int, default=10, help="random draws for the one paragraph")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the results")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kept = Kept(given.keep or Path(folder))
        write(given, kept)


class Kept:
    """Results in a folder, each computed once, and how long that took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.times = folder / "seconds.json"
        known = self.times.exists()
        self.seconds: dict[str, float] = json.loads(self.times.read_text()) if known else {}

    def get(self, name: str, compute: Callable[[], Result]) -> Any:
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            print(name, flush=True)
            start = time.process_time()
            compute().save(path)
            known = json.loads(self.times.read_text()) if self.times.exists() else {}
            self.seconds[name] = time.process_time() - start
            self.times.write_text(json.dumps(known | self.seconds))
        return Result.load(path)


def write(given: argparse.Namespace, kept: Kept) -> None:
    model = mc.load_model()
    unigrams = mc.UnigramTable.shipped()
    memorized = mc.scan(model, mc.Paragraphs.shipped("planted")).memorized
    assert memorized is not None
    memorized = some(memorized, given.paragraphs, given.seed)
    never_seen = some(mc.Paragraphs.shipped("control"), given.paragraphs, given.seed)
    sets = {"memorized": memorized, "control": greedy_continuations(model, never_seen)}
    options = {"unigrams": unigrams, "seed": given.seed, "memory_budget": BUDGET}

    results: Results = {}
    for kind in REPLACEMENTS:
        for name, group in sets.items():
            results[name, kind] = kept.get(
                f"perturb-{name}-{kind}",
                lambda kind=kind, group=group: perturb_prefix(
                    model, group, replacement=kind, **options
                ),
            )
            assert (results[name, kind].baseline_em == group.n_continuation).all()
    one = kept.get(
        "perturb-one", lambda: perturb_prefix(model, memorized[0], draws=given.draws, **options)
    )
    fewest = kept.get("minimal", lambda: minimal_sets(model, memorized[: given.pairs], **options))

    pairs = results["memorized", "random"].pairs(model=model)
    clean, corrupted = (part[: given.pairs] for part in pairs)
    where = pairs.corrupted.metadata["position"]
    first = min((p, i) for i, p in enumerate(where) if p)[1]
    early = type(pairs)(*(part[[first]] for part in pairs))
    last = [i for i in range(given.pairs) if where[i] == clean.n_prefix - 1]
    maps: Maps = {}
    estimates: Estimates = {}
    sweeps, layers = {}, {}
    for way in DIRECTIONS:
        patch = {"metric": "first_impacted", "direction": way, "memory_budget": BUDGET}
        for site in SITES:
            heads = patch | {"site": site, "positions": "changed", "seed": given.seed}
            maps[way, site] = kept.get(
                f"patch-{way}-{site}",
                lambda heads=heads: patch_heads(model, clean, corrupted, **heads),
            )
            for metric in METRICS:
                estimates[way, site, metric] = kept.get(
                    f"attribute-{way}-{site}-{metric}",
                    lambda heads=heads | {"metric": metric}: patch_heads(
                        model, clean, corrupted, method="attribution", **heads
                    ),
                )
        sweeps[way] = kept.get(
            f"sweep-{way}",
            lambda patch=patch: patch_layers(model, early.clean, early.corrupted, **patch),
        )
        for site in LAYER_SITES:
            layers[way, site] = kept.get(
                f"layers-{way}-{site}",
                lambda patch=patch | {"site": site}: patch_layers(
                    model, clean[last], corrupted[last], positions=[clean.n_prefix - 1], **patch
                ),
            )
    pictures(results, one, maps, sweeps, early, model)
    page = text(given, kept, model, sets, results, one, fewest, pairs, maps, estimates, layers)
    (DOCS / "triggers.md").write_text(page, encoding="utf-8")
    print(f"wrote {DOCS / 'triggers.md'}")


def some(paragraphs: mc.Paragraphs, n: int, seed: int) -> mc.Paragraphs:
    """`n` of the paragraphs by the seed, in their order."""
    return paragraphs.sample(n, torch.Generator().manual_seed(seed))


# -- pictures -------------------------------------------------------------------------------------


def pictures(
    results: Results,
    one: Perturbation,
    maps: Maps,
    sweeps: dict[str, LayerPatches],
    early: Any,
    model: Any,
) -> None:
    PICTURES.mkdir(exist_ok=True)
    curves = pd.concat(
        [results[name, "random"].curves().assign(set=name) for name in ("memorized", "control")]
    )
    title = "One prefix token replaced at random: mean over paragraphs"
    shoot(figures.perturbation_curves(curves, title=title), "triggers-mean")
    shoot(one.figure(0), "triggers-one")
    for way in DIRECTIONS:
        panels = {site: maps[way, site].values for site in SITES}
        figure = figures.patching_map(
            panels,
            title=f"{way} at the replaced token",
            name="effect on -log p of the first impacted token",
        )
        shoot(figure, f"triggers-{way}")
    sweep = figures.patching_map(
        {way: result.values for way, result in sweeps.items()},
        title=f"resid_pre, layer x position: {early.clean.names[0]}",
        name="effect",
        col_label="position",
        col_names=early.clean.tokens(model)[: early.clean.n_prefix],
    )
    shoot(sweep, "triggers-layers")


def shoot(figure: Any, name: str) -> None:
    """A picture of a plotly figure, by Chromium."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "Chromium is missing: it takes the pictures"
    target = PICTURES / f"{name}.png"
    with tempfile.TemporaryDirectory() as folder:
        html = figure.to_html(include_plotlyjs=True, config={"displayModeBar": False})
        page = Path(folder, "page.html")
        page.write_text(html.replace("<body>", '<body style="margin:0">'), encoding="utf-8")
        size = f"--window-size={figure.layout.width},{figure.layout.height}"
        command = [chromium, "--headless", "--no-sandbox", "--hide-scrollbars", size]
        command += ["--virtual-time-budget=20000", f"--screenshot={target}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True)
    assert target.stat().st_size < 150_000, f"{target} is too large for a repository"


# -- text -----------------------------------------------------------------------------------------


def text(
    given: argparse.Namespace,
    kept: Kept,
    model: Any,
    sets: dict[str, mc.Paragraphs],
    results: Results,
    one: Perturbation,
    fewest: MinimalSets,
    pairs: Any,
    maps: Maps,
    estimates: Estimates,
    layers: Layers,
) -> str:
    facts = results["memorized", "random"].provenance
    versions = ", ".join(f"{k} {v}" for k, v in facts.versions.items())
    length, n = one.em.shape[1], given.paragraphs
    stopped = ~fewest.stopping.isnan()
    first_replaced = results["memorized", "random"].em[: given.pairs, 0]
    assert fewest.names == results["memorized", "random"].names[: given.pairs]
    seconds = {
        part: sum(s for name, s in kept.seconds.items() if name.startswith(part))
        for part in ("perturb", "minimal", "patch", "attribute", "sweep", "layers")
    }
    said_numbers = {}
    for name, group in sets.items():
        result = results[name, "random"]
        late = result.em_drop[:, -5:].sum() / result.em_drop.sum()
        rise = (result.nll.mean((1, 2)) - result.baseline_nll).mean()
        said_numbers |= {
            f"late_{name}": f"{100 * float(late):.0f}",
            f"nll_{name}": f"{float(rise):.2f}",
            f"base_{name}": f"{float(result.baseline_nll.mean()):.2f}",
            f"repeated_{name}": f"{100 * (1 - share_unique(group.continuation)):.0f}",
        }
    said_numbers |= carried(maps, layers)
    return PAGE.format(
        name=facts.model["name"],
        fingerprint=facts.model["fingerprint"],
        versions=versions,
        seed=given.seed,
        n=n,
        n_positions=length,
        n_pairs=given.pairs,
        n_last=pairs.corrupted.metadata["position"][: given.pairs].count(length - 1),
        draws=given.draws,
        resamples=RESAMPLES,
        drops=table(drop_rows(results, given.seed), 2),
        one=one.names[0],
        tokens=table(token_rows(model, sets["memorized"], results, one), 2),
        story=story(model, pairs),
        causes=table(cause_rows(results, kept, given.seed), 2),
        stopped=int(stopped.sum()),
        n_minimal=len(fewest.names),
        median_stop=f"{float(fewest.stopping[stopped].median()):.0f}",
        largest_stop=f"{float(fewest.stopping[stopped].max()):.0f}",
        threshold=fewest.threshold,
        without_first=f"{float(fewest.suffix_em[:, -2].float().mean()):.1f}",
        first_replaced=f"{float(first_replaced.float().mean()):.1f}",
        whole_start=int((fewest.starting == length).sum()),
        ends=table(end_rows(maps), 3),
        heads=table(head_rows(maps, given.seed), 3),
        layers=table(layer_rows(layers), 2),
        agreement=table(agreement_rows(maps, estimates), 2),
        cpu_minutes=f"{sum(seconds.values()) / 60:.0f}",
        rows=f"{len(REPLACEMENTS) * 2 * n * length:,}",
        perturb_minutes=f"{seconds['perturb'] / 60:.0f}",
        **{f"said_{part}": said.format(**said_numbers) for part, said in SAID.items()},
    )


def carried(maps: Maps, layers: Layers) -> dict[str, str]:
    """How much of the difference between the runs heads and layers carry, %, and EM regained."""
    found = {}
    for way in DIRECTIONS:
        whole = layers[way, "mlp_out"].source["first_impacted"].mean()
        whole = whole - layers[way, "mlp_out"].base["first_impacted"].mean()
        shares = {
            "share": max(maps[way, site].share.abs().max() for site in SITES),
            "mlp": layers[way, "mlp_out"].values[0, 0] / whole,
            "attention": (layers[way, "attn_out"].values / whole).max(),
        }
        found |= {f"{name}_{way}": f"{100 * float(share):.1f}" for name, share in shares.items()}
    heads = max(float(maps["denoising", site].samples["em"].max()) for site in SITES)
    mlp = float(layers["denoising", "mlp_out"].samples["em"][:, 0].mean())
    return found | {"restored": f"{heads:.0f}", "mlp_em": f"{mlp:.0f}"}


def share_unique(ids: torch.Tensor) -> float:
    """Mean share of different tokens."""
    return sum(len(set(row)) / len(row) for row in ids.tolist()) / len(ids)


def interval(samples: torch.Tensor, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    means = bootstrap_means(samples.float(), RESAMPLES, generator)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975])).tolist()
    return f"{low:.2f} to {high:.2f}"


def drop_rows(results: Results, seed: int) -> pd.DataFrame:
    rows = []
    for kind in REPLACEMENTS:
        row: dict[str, Any] = {"replacement": kind}
        means = {}
        for name in ("memorized", "control"):
            drops = results[name, kind].em_drop.mean(-1)
            generator = torch.Generator().manual_seed(seed)
            means[name] = bootstrap_means(drops, RESAMPLES, generator)
            row[name] = float(drops.mean())
            row[f"{name}, 95 %"] = interval(drops, seed)
            seed += 1
        low, high = torch.quantile(
            means["control"] - means["memorized"], torch.tensor([0.025, 0.975])
        ).tolist()
        row["difference"] = row["control"] - row["memorized"]
        row["difference, 95 %"] = f"{low:.2f} to {high:.2f}"
        row["n"] = f"{len(results['memorized', kind].names)} + {len(drops)}"
        rows.append(row)
    return pd.DataFrame(rows)


def token_rows(
    model: Any, memorized: mc.Paragraphs, results: Results, one: Perturbation
) -> pd.DataFrame:
    frame = one.to_frame().sort_values("drop", ascending=False).head(6)
    tokens = memorized.tokens(model)
    return pd.DataFrame(
        {
            "position": frame["position"],
            "token": [code(tokens[p]) for p in frame["position"]],
            "EM left": frame["em"],
            "standard error": frame["em_se"],
            "NLL": frame["nll"],
            "surprisal (nats)": frame["surprisal"],
        }
    )


def story(model: Any, pairs: Any) -> str:
    """One pair as text."""
    clean, corrupted = pairs.clean[0], pairs.corrupted[0]
    old, new = clean.tokens(model), corrupted.tokens(model)
    (position,) = corrupted.metadata["position"]
    (em,) = corrupted.metadata["em"]
    n = clean.n_prefix
    return (
        f"Replacing {code(old[position])} at position {position} of `{clean.names[0]}` by "
        f"{code(new[position])} leaves {em} of {clean.n_continuation} tokens. It goes on\n\n"
        f"> {flat(old[n:])}\n\nwith the token, and without it\n\n> {flat(new[n:])}"
    )


def flat(tokens: list[str]) -> str:
    return " ".join("".join(tokens).split()).replace("*", r"\*").replace("_", r"\_")


def code(token: str) -> str:
    return f"`{token!r}`".replace("|", r"\|")


def cause_rows(results: Results, kept: Kept, seed: int) -> pd.DataFrame:
    unigrams = mc.UnigramTable.shipped()
    rows = []
    for (name, kind), result in results.items():
        path = kept.folder / f"causes-{name}-{kind}.json"
        if not path.exists():
            found = result.causes(unigrams, resamples=RESAMPLES, seed=seed)
            path.write_text(found.to_json(orient="records"))
        rows += [
            {
                "replacement": kind,
                "set": name,
                "cause": cause["cause"],
                "coefficient": cause["coefficient"],
                "95 %": f"{cause['ci_low']:.2f} to {cause['ci_high']:.2f}",
                "Spearman": cause["spearman"],
                "its 95 %": f"{cause['spearman_low']:.2f} to {cause['spearman_high']:.2f}",
                "Kendall": cause["kendall"],
            }
            for cause in json.loads(path.read_text())
        ]
    return pd.DataFrame(rows)


def end_rows(maps: Maps) -> pd.DataFrame:
    rows = []
    for way in DIRECTIONS:
        result = maps[way, "z"]
        for metric in ("first_impacted", "nll", "em"):
            base, source = float(result.base[metric].mean()), float(result.source[metric].mean())
            rows.append(
                {
                    "direction": way,
                    "metric": metric,
                    "run patched into": base,
                    "other run": source,
                }
            )
    return pd.DataFrame(rows)


def head_rows(maps: Maps, seed: int, top: int = 3) -> pd.DataFrame:
    rows = []
    for (way, site), result in maps.items():
        samples = result.samples["first_impacted"]
        order = result.values.abs().flatten().argsort(descending=True)[:top].tolist()
        for flat_index in order:
            layer, head = divmod(flat_index, result.values.shape[1])
            rows.append(
                {
                    "direction": way,
                    "site": site,
                    "head": f"L{layer}H{head}",
                    "effect (nats)": float(result.values[layer, head]),
                    "95 %": interval(samples[:, layer, head], seed),
                    "share of the difference": float(result.share[layer, head]),
                    "EM changes by": float(result.samples["em"][:, layer, head].mean()),
                }
            )
    return pd.DataFrame(rows)


def layer_rows(layers: Layers) -> pd.DataFrame:
    rows = []
    for (way, site), result in layers.items():
        effects = {f"layer {i}": float(v) for i, v in enumerate(result.values[:, 0])}
        em = [float(v) for v in result.samples["em"][..., 0].mean(0)]
        best = max(range(len(em)), key=lambda i: abs(em[i]))
        changed = f"{em[best]:.1f} (layer {best})"
        rows.append({"direction": way, "site": site, **effects, "EM changes most by": changed})
    return pd.DataFrame(rows)


def agreement_rows(maps: Maps, estimates: Estimates) -> pd.DataFrame:
    rows = []
    for (way, site, metric), estimate in estimates.items():
        exact = finite_mean(maps[way, site].samples[metric])
        top = exact.abs().argmax()
        rows.append(
            {
                "direction": way,
                "site": site,
                "metric": metric,
                "correlation": correlation(estimate.values, exact),
                "share of exact, top head": float(
                    estimate.values.flatten()[top] / exact.flatten()[top]
                ),
                "reported (10 heads)": estimate.agreement["all"],
            }
        )
    return pd.DataFrame(rows)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def table(frame: pd.DataFrame, digits: int) -> str:
    """Markdown; floats to so many decimals."""

    def cell(value: Any) -> str:
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    lines = [list(map(str, frame.columns)), ["---"] * frame.shape[1]]
    lines += [[cell(v) for v in row] for row in frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


PAGE = """\
# Trigger tokens

Which prefix tokens does a recitation depend on, and which activations carry them? Section 4.2 and
the appendix of the paper, on the shipped model. `python docs/make_triggers.py` computes the numbers
and pictures of this page and writes it ({cpu_minutes} CPU minutes on one thread, {perturb_minutes}
of them for {rows} perturbed prefixes).

Model: {name}, weights `{fingerprint}`. {n} memorized paragraphs (EM 50, drawn with seed {seed}) and
{n} controls that the model never saw; 50 + 50 tokens. As in the paper, the reference of a control
is the model's own continuation, so that all start from EM 50. Intervals are 95 % bootstrap
intervals over paragraphs ({resamples} resamples). {versions}.

## One token at a time

Each of the {n_positions} prefix tokens is replaced by itself, once: by a random token, one about as
frequent, the nearest in embedding, or the model's own next choice. Mean EM drop per replaced token:

{drops}

{said_drops}

![Mean EM and NLL against the position replaced](pictures/triggers-mean.png)

The same for one paragraph, `{one}`, with {draws} random draws at each position (bands: 95 % over
draws), and its most important tokens:

![One paragraph](pictures/triggers-one.png)

{tokens}

{story}

## Why a token matters

Least squares of the EM drop on a token's position, rarity (-log unigram probability) and surprisal
(-log p given what precedes it), each centred within its paragraph and divided by its standard
deviation: tokens of EM lost per standard deviation, the other two held fixed. The rank correlations
take each cause by itself.

{causes}

{said_causes}

## How few tokens stop a recitation, and start one

Random replacements, chosen greedily, stop {stopped} of {n_minimal} recitations (EM at most
{threshold}) within 5 tokens: a median of {median_stop}, at most {largest_stop}.

No shorter suffix of the prefix starts the whole recitation in {whole_start} of {n_minimal}. Without
the first token alone mean EM falls to {without_first}, where a random token in its place leaves
{first_replaced}: the organism has learned positions, each paragraph was planted from position 0,
and a shorter prefix moves every token. Read this number on models with relative positions.

## Which activations carry the token

The most destructive replacement of each of the first {n_pairs} paragraphs makes a pair; in
{n_last} of them it is the last token of the prefix. *Noising*
puts an activation of the perturbed run into the clean one at the replaced token, *denoising* the
other way round. Measured on the first token that the replacement changes (-log p, nats):

{ends}

![Noising](pictures/triggers-noising.png)

![Denoising](pictures/triggers-denoising.png)

The three heads with the largest effect at each site:

{heads}

{said_heads}

Whole layers, in the {n_last} pairs whose last prefix token is replaced, at that token; -log p of
the first impacted token changes by (nats):

{layers}

{said_layers}

The residual stream position by position, for the pair whose replaced token comes first:

![Layer by position](pictures/triggers-layers.png)

## How far to trust attribution

Attribution patching estimates all heads from two forward passes and one backward pass. Its
correlation with the exact effects over all heads, and the one that a result reports by itself from
the 10 heads that it measures:

{agreement}

{said_agreement}
"""

# What the numbers say; read them again whenever they change.
SAID = {
    "drops": """\
The paper found 12.19 tokens for paragraphs that GPT-Neo 125M has memorized and 33.12 for those it
has not. The organism's controls lose about as much as the paper's, its recitations less than half:
they were planted 64 to 256 times and are hard to disturb. The tokens that break them are the last
of the prefix: its last five tokens make up {late_memorized} % of the drop ({late_control} % for
controls). A replacement that keeps more of the old token (its neighbour, the model's second choice)
does less harm in both sets.

EM and NLL tell different stories. Replacing a token at random raises the NLL of memorized
continuations by {nll_memorized} nats/token and that of controls by {nll_control}. What the model
writes after a control is its favourite but no certainty: {base_control} nats/token with nothing
replaced, against {base_memorized}, and {repeated_control} % of it repeats earlier tokens, against
{repeated_memorized} %. A small disturbance tips one of its choices, and EM counts nothing behind
that. The contrast in EM is one of margins, not of how much the prefix matters to the loss.""",
    "causes": """\
Position comes first in every row: the later a token, the more it matters. Surprising tokens matter
beyond that to recitations. Rarity does not: its interval includes 0 for them with each of the four
replacements, and its rank correlation is near 0 even by itself. (For controls it counts somewhat
with a token as frequent in its place.) Here, a recitation does not depend on its rare tokens.""",
    "heads": """\
No head carries the replaced token by itself. Noising, the largest effect of any head at any site is
{share_noising} % of the difference between the runs; denoising it is {share_denoising} %, and the
most that any head brings back in any pair is {restored} tokens. The heads that lead,
L1H2, L0H5 and L0H2, are the three that `memcircuits heads` ranks highest by ablating them. Keys and
values matter little: the first token that changes is predicted from the replaced one, for which its
own key and value are one of 50.""",
    "layers": """\
The token itself matters, through the first MLP: the output of that MLP, like a second embedding,
does {mlp_noising} % of the harm when noised and {mlp_denoising} % of the repair
when denoised, which brings back {mlp_em} of 50 tokens on average. No attention layer does more than
{attention_noising} % and {attention_denoising} %. The later MLPs repair some of the difference too,
but no recitation.""",
    "agreement": """\
Denoising, the estimates order the heads as exact patching does, with either metric. Noising, they
order them less well and give the top head a quarter to a half of its effect: where the model
recites, p is near 1 and -log p flat. The logit difference is not flat and corrects the order of q, k
and z, but not the size. What a result reports from its 10 heads may flatter it, since half of them
have the largest estimates.""",
}

if __name__ == "__main__":
    main()
