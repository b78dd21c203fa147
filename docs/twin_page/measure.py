"""The measurements of docs/twin.md, each kept in a folder and not computed again."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triggers_page.kept import Kept

import memcircuits as mc
from memcircuits.base.io import read_safetensors
from memcircuits.base.statistics import bootstrap_interval
from memcircuits.benchmark.estimands import EffectSets, compare_estimands, head_effects
from memcircuits.benchmark.natural import natural_leaderboard
from memcircuits.benchmark.natural_trials import (
    DIRECTIONS,
    Twins,
    read_natural_trials,
    run_natural_trials,
    told_apart,
)
from memcircuits.evidence.transplants.results import MEASURES, Transplant
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.models.loading import as_bridge, read_pretrained


class Sizes(NamedTuple):
    """How many paragraphs each measurement takes."""

    transplants: int = 16
    trials: int = 6
    per_trial: int = 3
    memorized: int = 48
    dosed: int = 60
    followed: int = 120  # over checkpoints, and as many controls
    formation: int = 4  # of these, whose heads are measured


FLOOR_UNITS = ("head", "attn", "mlp", "layer", "rest")
QUICK = Sizes(2, 2, 2, 10, 10, 8, 1)


class Study:
    """The models, the paragraphs, and what has been measured."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.sizes = QUICK if given.quick else Sizes()
        self.kept = Kept(given.keep)
        self.model, self.twin = mc.load_model(given.model), mc.load_model(given.twin)
        self.noise = None if given.noise is None else mc.load_model(given.noise)
        self.paragraphs = mc.Paragraphs.shipped()
        self.unigrams: mc.UnigramTable | None = mc.UnigramTable.shipped()
        if given.paragraphs is not None:
            lengths = {"n_prefix": given.n_prefix, "n_continuation": given.n_continuation}
            self.paragraphs = mc.Paragraphs.read(given.paragraphs, self.model, **lengths)
            self.unigrams = None
        self.twins = Twins.of(
            self.model, self.twin, self.paragraphs, noise=self.noise, unigrams=self.unigrams
        )

    @property
    def models(self) -> dict[str, Any]:
        """The models by name; the noise twin only where it is given."""
        models = {"model": self.model, "twin": self.twin, "noise twin": self.noise}
        return {name: model for name, model in models.items() if model is not None}

    @property
    def doses(self) -> list[int]:
        """How often the model that was trained on a paragraph saw it."""
        metadata = self.paragraphs.metadata
        other = metadata.get("twin_repetitions", metadata["repetitions"])
        return [max(pair) for pair in zip(metadata["repetitions"], other, strict=True)]

    def some(self, paragraphs: mc.Paragraphs, n: int) -> mc.Paragraphs:
        """`n` of the paragraphs by the seed."""
        return paragraphs.sample(n, torch.Generator().manual_seed(self.given.seed))

    def numbers(self) -> dict[str, Any]:
        """All numbers of the page."""
        start = time.process_time()
        numbers: dict[str, Any] = {"settings": self._settings()}
        parts: dict[str, Callable[[], Any]] = {
            "em": self._em,
            "bits": self._bits,
            "kinds": self._kinds,
            "transplants": self._transplants,
            "natural": self._natural,
            "estimands": self._estimands,
            "formation": self._formation,
        }
        for name, measure in parts.items():
            print(name, flush=True)
            numbers[name] = measure()
        numbers["settings"]["seconds"] = round(time.process_time() - start)
        return json.loads(json.dumps(numbers).replace("NaN", "null"))

    def _settings(self) -> dict[str, Any]:
        known = {d: told_apart(*self.twins.side(d)) for d in DIRECTIONS}
        return {
            "seed": self.given.seed,
            "told_apart": {name: len(paragraphs) for name, paragraphs in known.items()},
            "noise": self.noise is not None,
            "fingerprints": {
                name: mc.scan(model, self.paragraphs[0], progress=False).provenance.model[
                    "fingerprint"
                ]
                for name, model in self.models.items()
            },
            **self.sizes._asdict(),
        }

    def _em(self) -> list[dict[str, Any]]:
        """Mean EM with its interval, of every role in every model."""
        rows = []
        roles = self.paragraphs.metadata["role"]
        for name, model in self.models.items():
            scan = self.kept.get(f"scan-{name}", lambda m=model: mc.scan(m, self.paragraphs))
            for role in dict.fromkeys(roles):
                em = scan.em[[i for i, r in enumerate(roles) if r == role]].float()
                row = {"model": name, "role": role, "n": len(em), "em": float(em.mean())}
                if len(em) > 1:
                    row["low"], row["high"] = bootstrap_interval(em, seed=self.given.seed).tolist()
                full = em == self.paragraphs.n_continuation
                rows.append(row | {"full": int(full.sum())})
        return rows

    def _counterfactual(self, name: str) -> Any:
        other = {"twin": self.twin, "noise twin": self.noise}[name]
        return self.kept.get(
            f"counterfactual-{name}",
            lambda: mc.counterfactual(self.model, other, self.paragraphs, ngram=self.unigrams),
        )

    def _bits(self) -> list[dict[str, Any]]:
        """Bits per token by role and dose, against the twin and against the noise twin."""
        rows = []
        roles, doses = self.paragraphs.metadata["role"], self.doses
        groups = {f"{role}|{dose}" for role, dose in zip(roles, doses, strict=True)}
        for name in ("twin", "noise twin"):
            if name == "noise twin" and self.noise is None:
                continue
            result = self._counterfactual(name)
            for group in sorted(groups, key=lambda g: (g.split("|")[0], int(g.split("|")[1]))):
                role, dose = group.split("|")
                chosen = [
                    i
                    for i, of in enumerate(zip(roles, doses, strict=True))
                    if of == (role, int(dose))
                ]
                bits = result.remembered[chosen].mean(-1)
                low, high = (
                    bootstrap_interval(bits, seed=self.given.seed).tolist()
                    if len(bits) > 1
                    else (None, None)
                )
                rows.append(
                    {
                        "against": name,
                        "role": role,
                        "repetitions": int(dose),
                        "n": len(chosen),
                        "em": float(result.em[chosen].float().mean()),
                        "other_em": float(result.twin_em[chosen].float().mean()),
                        "guessable": float(result.guessable[chosen].mean()),
                        "known": float(result.known[chosen].mean()),
                        "remembered": float(bits.mean()),
                        "low": low,
                        "high": high,
                    }
                )
        return rows

    def _kinds(self) -> dict[str, int]:
        """How many of the model's recitations are of which kind."""
        kinds = [kind for kind in self._counterfactual("twin").kinds if kind]
        return {kind: kinds.count(kind) for kind in ("recite", "reconstruct", "recollect")}

    def _transplants(self) -> dict[str, Any]:
        """Effects of all components in both directions, and against the noise twin."""
        results = {}
        for direction in DIRECTIONS:
            model, other, paragraphs = self.twins.side(direction)
            chosen = self.some(told_apart(model, other, paragraphs), self.sizes.transplants)
            for patched in ("weights", "activations"):
                results[f"{direction}, {patched}"] = self.kept.get(
                    f"transplant-{direction}-{patched}",
                    lambda m=model, o=other, c=chosen, p=patched: mc.transplant(m, o, c, patched=p),
                )
            if direction == "model" and self.noise is not None:
                results["noise floor"] = self.kept.get(
                    "transplant-noise",
                    lambda c=chosen: mc.transplant(self.model, self.noise, c, units=FLOOR_UNITS),
                )
        return {name: self._summary(result) for name, result in results.items()}

    def _summary(self, result: Transplant) -> dict[str, Any]:
        frame = result.to_frame(seed=self.given.seed)
        frame.insert(0, "component", [str(part) for part in result.components])
        rows = json.loads(frame.to_json(orient="records", double_precision=5))
        return {"n": len(result.names), "total": result.total, "components": rows}

    def _natural(self) -> list[dict[str, Any]]:
        folder = self.given.keep / "natural"
        run_natural_trials(
            self.twins,
            folder,
            n_trials=self.sizes.trials,
            n_paragraphs=self.sizes.per_trial,
            localizers=["gradient-max", "random"] if self.given.quick else None,
            seed=self.given.seed,
        )
        frame = natural_leaderboard(read_natural_trials(folder), seed=self.given.seed)
        return json.loads(frame.to_json(orient="records", double_precision=5))

    def _estimands(self) -> list[dict[str, Any]]:
        path = self.given.keep / "estimands.json"
        if not path.exists():
            sets = self._effect_sets()
            frame = compare_estimands(sets, seed=self.given.seed)
            path.write_text(frame.to_json(orient="records", double_precision=5))
        return json.loads(path.read_text())

    def _effect_sets(self) -> EffectSets:
        n = self.sizes.memorized
        memorized = self.some(told_apart(*self.twins.side("model")), n)
        text = self.some(self.twins.neither, n)
        own = greedy_continuations(self.model, text, progress=False)
        dosed = self.some(self.twins.own, self.sizes.dosed)
        repetitions = torch.tensor(dosed.metadata["repetitions"])
        remembered = mc.counterfactual(self.model, self.twin, dosed).remembered.mean(-1)
        truth = mc.transplant(self.model, self.twin, memorized, units=["head"])
        return EffectSets(
            *(head_effects(self.model, group) for group in (memorized, own, text, dosed)),
            repetitions,
            remembered,
            {name: truth.samples[name] for name in MEASURES},
        )

    def _formation(self) -> dict[str, Any] | None:
        """By step and dose, for paragraphs of the model alone; None without checkpoints."""
        if self.given.checkpoints is None:
            return None
        steps, twins = (_checkpoints(self.given.checkpoints, name) for name in ("organism", "twin"))
        shared = sorted(steps.keys() & twins.keys())
        result = self.kept.get(
            "formation",
            lambda: mc.formation(
                {step: steps[step] for step in shared},
                self.some(self.twins.own, self.sizes.followed),
                twins={step: twins[step] for step in shared},
                control=self.some(self.twins.neither, self.sizes.followed),
                max_paragraphs=self.sizes.formation,
                seed=self.given.seed,
            ),
        )
        frames = {"steps": result.to_frame(seed=self.given.seed), "agreement": result.agreement()}
        return {
            name: json.loads(frame.to_json(orient="records", double_precision=5))
            for name, frame in frames.items()
        }


def _checkpoints(folder: Path, name: str) -> dict[int, Callable[[], Any]]:
    """Step -> a function that loads `NAME-step-STEP`, a folder or the weights of the organism."""
    found: dict[int, Callable[[], Any]] = {}
    for path in sorted(folder.glob(f"{name}-step-*")):
        step = int(path.stem.rsplit("-", 1)[1])
        found[step] = lambda p=path: mc.load_model(p) if p.is_dir() else _with_weights(p)
    assert found, f"{folder} holds no {name}-step-*"
    return found


def _with_weights(path: Path) -> Any:
    """The organism with the weights of a file; tied ones are stored once."""
    source, tokenizer, _ = read_pretrained("organism")
    weights, _ = read_safetensors(path)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            parameter.copy_(weights[name])
    return as_bridge(source, tokenizer, name=path.stem)
