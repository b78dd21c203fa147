"""Audit an edit: is the text erased, or only hidden?

An edit that blocks the first token of a continuation brings EM to 0, and leaves everything else of
the text in the weights. So the yardstick is the model that never saw the text: exact for planted
paragraphs (the model before planting), a twin for trained ones. Without either the stand-in of
`memcircuits.editing.references` takes its place, which can tell distributions but cannot be
attacked, rounded or trained.

The *erasure depth* is 1 - KL(reference || edited) / KL(reference || unedited) along the text, given
all true tokens before each position. Blocking one token of fifty hardly changes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from memcircuits.base.errors import InputError, at_least
from memcircuits.base.statistics import group_notes
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.data.tokens import refuse_other_tokenizer
from memcircuits.editing.audits.layers import patched_nll, read_residuals
from memcircuits.editing.audits.measures import (
    TargetTexts,
    draw_attacks,
    own_prefix_measures,
    recased,
)
from memcircuits.editing.audits.result import EditAudit
from memcircuits.editing.audits.verdict import BACK
from memcircuits.editing.edit import Edit
from memcircuits.editing.evaluation import evaluate_edit
from memcircuits.editing.references import proxy_log_probs
from memcircuits.editing.relearning import recovery_curve
from memcircuits.editing.unlearning_objective import ReferenceDistribution
from memcircuits.measure.continuation import read_continuation, score_paragraphs
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance

MAX_TRAINED = 16  # paragraphs in each step of relearning


@plain_torch()
def audit_edit(  # noqa: PLR0913
    model: Model,
    edit: Edit,
    targets: ParagraphsLike,
    control: ParagraphsLike,
    twin: Model | None = None,
    *,
    others: ParagraphsLike | None = None,
    heldout: ParagraphsLike | None = None,
    truth: Edit | None = None,
    attacks: int = 5,
    relearning_steps: int = 5,
    n_samples: int = 1000,
    seed: int = 0,
    memory_budget: int | None = None,
    progress: bool = True,
) -> EditAudit:
    """Measure an edit against the model that never saw its targets; the module's text says why.

    Args:
        model: the model that the edit was made for.
        edit: the edit.
        targets: the paragraphs that it removed.
        control: paragraphs that it was not given; attacks take other tokens from them, and
            relearning trains on them.
        twin: a model of the same tokenizer that was not trained on the targets; None: a stand-in.
        others: further memorized paragraphs, which are to stay, and which relearning trains on;
            None: neither.
        heldout: text whose perplexity is measured; None: not measured.
        truth: what wrote the targets, such as the result of `plant`; its weights are compared with
            those that the edit changed. None: not compared.
        attacks: draws of each sort of attacked prefix, at least 1.
        relearning_steps: Adam steps of each relearning curve; 0: none.
        n_samples: samples that `extraction` allows an attacker.
        seed: of the attacks.
        memory_budget: maximum bytes per batch.
        progress: show bars on stderr.

    Returns:
        An `EditAudit`; its `verdict` says in words what it found.

    Raises:
        InputError: for unusable paragraphs, targets of which the unedited model recites nothing, a
            twin of another tokenizer or one that recites a target, or another model than the
            edit's.
    """
    adapter = adapt(model)
    at_least("attacks", attacks, 1)
    at_least("relearning_steps", relearning_steps, 0)
    targets = Paragraphs.of(targets, model, "targets")
    control = Paragraphs.of(control, model, "control")
    others = None if others is None else Paragraphs.of(others, model, "others")
    other = _check_twin(adapter, twin, targets)
    harm = evaluate_edit(
        adapter,
        edit,
        targets,
        control,
        others=others,
        heldout=heldout,
        attacks=0,
        n_samples=n_samples,
        memory_budget=memory_budget,
        progress=progress,
    )
    audit = _Audit(adapter, other, edit, targets, control, memory_budget)
    texts = audit.texts(attacks, seed)
    samples, token_log_prob = audit.measure(texts)
    if not (samples["em"][0] > 0).any():
        raise InputError("targets", "not recited by the unedited model", "give some that are")
    return EditAudit(
        ids=targets.ids,
        n_prefix=targets.n_prefix,
        names=targets.names,
        token_log_prob=token_log_prob,
        samples=samples,
        relearning=audit.relearning(others, relearning_steps, progress),
        layer_nll=audit.layer_nll(),
        harm={k: v for k, v in harm.samples.items() if not k.startswith("memorized/")},
        reference="stand-in" if other is None else "twin",
        n_attacks=sum(map(len, texts.attacked.values())),
        n_samples=n_samples,
        weights_auc=None if truth is None else weights_auc(adapter, edit, truth),
        groups={**harm.groups, "targets": targets.groups},
        provenance=Provenance.of(
            adapter,
            {"targets": targets, "control": control, "others": others},
            edit=dict(edit.provenance.options),
            twin=None if other is None else dict(Provenance.of(other, {}).model),
            attacks=attacks,
            relearning_steps=relearning_steps,
            n_samples=n_samples,
            seed=seed,
        ),
        notes=group_notes({"target": targets.groups}),
        bos=targets.bos,
    )


@dataclass(frozen=True)
class _Audit:
    """The models and paragraphs of an audit; the attributes are those of `audit_edit`."""

    adapter: Adapter
    twin: Adapter | None
    edit: Edit
    targets: Paragraphs
    control: Paragraphs
    memory_budget: int | None

    def texts(self, attacks: int, seed: int) -> TargetTexts:
        """The targets behind their own and attacked prefixes, and the two distributions."""
        attacked = draw_attacks(self.targets, self.control, self.adapter.n_ctx, attacks, seed)
        capitals = recased(self.targets, self.adapter.tokenizer)
        if capitals is not None:
            attacked["recased"] = [capitals]
        if self.twin is None:
            generator = torch.Generator().manual_seed(seed)
            reference = proxy_log_probs(
                self.adapter, self.targets, self.control, generator, self.memory_budget
            )
        else:
            reference = self._log_probs(self.twin)
        unedited = self._log_probs(self.adapter)
        return TargetTexts(self.targets, attacked, reference, unedited, self.memory_budget)

    def _log_probs(self, model: Adapter) -> Float[Tensor, "paragraph pos d_vocab"]:
        return ReferenceDistribution.of(model, self.targets, self.memory_budget).log_p.cpu()

    def measure(self, texts: TargetTexts) -> tuple[dict[str, Tensor], Tensor]:
        """Measures [arm, paragraph] and log-probabilities [arm, paragraph, pos] of three arms."""
        arms = [texts.measure(self.adapter)]
        with self.edit.apply(self.adapter):
            arms.append(texts.measure(self.adapter))
        arms.append(self._stand_in(texts) if self.twin is None else texts.measure(self.twin))
        absent = torch.full((len(self.targets),), torch.nan)
        names = arms[0][0]
        samples = {name: torch.stack([arm[0].get(name, absent) for arm in arms]) for name in names}
        return samples, torch.stack([arm[1] for arm in arms])

    def _stand_in(
        self, texts: TargetTexts
    ) -> tuple[dict[str, Tensor], Float[Tensor, "paragraph pos"]]:
        """What the stand-in's distributions tell."""
        scores = read_continuation(texts.reference, self.targets.continuation)
        log_p = texts.unedited
        moved = (log_p.exp() * (log_p - texts.reference)).sum(-1).mean(-1)
        measures = own_prefix_measures(scores)
        return measures | {"kl": torch.zeros_like(moved), "kl_unedited": moved}, scores.log_prob

    def relearning(
        self, others: Paragraphs | None, steps: int, progress: bool
    ) -> dict[str, Float[Tensor, "arm step paragraph"]]:
        """EM of the targets while the models train on each text: unedited, edited and twin."""
        if steps == 0:
            return {}
        targets, n_prefix = self.targets, self.targets.n_prefix
        half = targets.n_continuation // 2
        cases = {"other text": (targets, self.control[:MAX_TRAINED])}
        if others is not None:
            cases["other recitations"] = (targets, others[:MAX_TRAINED])
        if half:
            first_half = targets.with_ids(targets.ids[:, : n_prefix + half])
            cases["its first half"] = (targets.with_ids(targets.ids, n_prefix + half), first_half)
        curves = {}
        for name, (forgotten, trained) in cases.items():
            em = recovery_curve(
                self.adapter,
                self.edit,
                forgotten,
                trained,
                twin=self.twin,
                steps=steps,
                memory_budget=self.memory_budget,
                progress=progress,
            ).em.float()
            curves[name] = em[[1, 0, *range(2, len(em))]].contiguous()
        return curves

    def layer_nll(self) -> Float[Tensor, "source layer paragraph"] | None:
        """NLL of the unedited model with the residual streams of all three arms."""
        twin, adapter = self.twin, self.adapter
        if twin is None or not adapter.supports_partial_forward or adapter.n_layers < 2:
            return None
        if (twin.n_layers, twin.d_model) != (adapter.n_layers, adapter.d_model):
            return None
        residuals = [read_residuals(adapter, self.targets)]
        with self.edit.apply(adapter):
            residuals.append(read_residuals(adapter, self.targets))
        residuals.append(read_residuals(twin, self.targets))
        return torch.stack([patched_nll(adapter, self.targets, each) for each in residuals])


def _check_twin(adapter: Adapter, twin: Model | None, targets: Paragraphs) -> Adapter | None:
    """The twin's adapter.

    Raises:
        InputError: for the model itself, one of another tokenizer, or one that recites a target.
    """
    if twin is None:
        return None
    other = adapt(twin)
    if other.model is adapter.model:
        raise InputError("twin", "the model itself", "give a model that never saw the targets")
    refuse_other_tokenizer("twin", adapter.model, other.model)
    if known := recited_by(twin, targets):
        raise InputError(
            "twin",
            f"recites {known[0]}" + (f" and {len(known) - 1} more" if known[1:] else ""),
            "give a model that was not trained on the targets, or none for a stand-in",
        )
    return other


def recited_by(model: Model, targets: Paragraphs) -> list[str]:
    """Names of the targets of which a model recites half or more: it is no twin for those."""
    adapter = adapt(model)
    with adapter.preserving_state():
        em = score_paragraphs(adapter, targets).em
    named = zip(targets.names, em.tolist(), strict=True)
    return [name for name, n in named if n >= BACK * targets.n_continuation]


def weights_auc(adapter: Adapter, edit: Edit, truth: Edit) -> float:
    """Probability that a weight of the truth changed more than one elsewhere; ties count half.

    Raises:
        InputError: if the truth names all weights, or none.
    """
    from scipy.stats import rankdata

    changes, labels = [], []
    for weight in adapter.weights():
        name = f"{weight.layer}.{weight.component}"
        change = torch.zeros(weight.values.numel())
        label = torch.zeros(weight.values.numel(), dtype=torch.bool)
        if name in edit.indices:
            change[edit.indices[name]] = edit.deltas[name].abs().float()
        if name in truth.indices:
            label[truth.indices[name]] = True
        changes.append(change)
        labels.append(label)
    is_true = torch.cat(labels).numpy()
    n_true, n_false = int(is_true.sum()), int((~is_true).sum())
    if not n_true or not n_false:
        raise InputError("truth", f"{n_true} of {len(is_true)} weights", "name some of them")
    ranks = rankdata(torch.cat(changes).numpy())
    return float((ranks[is_true].sum() - n_true * (n_true + 1) / 2) / (n_true * n_false))
