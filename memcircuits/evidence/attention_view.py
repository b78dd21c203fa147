"""Look at what heads attend to: from a model and a paragraph to an `AttentionView`.

The picture itself, and why it is safe and offline, is `memcircuits.pages`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from memcircuits.core.errors import InputError, sequence
from memcircuits.core.heads import Head
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.unigrams import UnigramTable
from memcircuits.display.pages import AttentionView, Strip
from memcircuits.models.adapter import Adapter
from memcircuits.models.hooks import hook_name
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance


def attention_view(
    model: Any,
    paragraph: Any,
    *,
    layer: int | None = None,
    heads: Sequence[Head | int] | None = None,
    compare: Any = None,
    unigrams: UnigramTable | None = None,
) -> AttentionView:
    """Attention patterns of some heads on one paragraph, as an interactive view.

    Args:
        model: HookedTransformer or TransformerBridge.
        paragraph: one paragraph: `Paragraphs` of one, a string in a list, or ids [1, pos].
        layer: show the heads of this layer.
        heads: which heads: `Head`s of any layer, or indices within `layer`; by default all.
        compare: a second paragraph shown beside it, such as the perturbed one
            (`Perturbation.pairs`); tokens that differ are underlined.
        unigrams: token counts; adds a strip coloured by rarity.

    Returns:
        An `AttentionView`: shows itself in notebooks, `.to_html(path)` writes a page.

    Raises:
        InputError: for a layer or head that the model does not have, or several paragraphs.

    Example:
        >>> view = mc.attention_view(model, memorized[0], layer=1)
        >>> view.patterns.shape  # head, query, key
        torch.Size([8, 100, 100])
    """
    adapter = adapt(model)
    chosen = _choose(adapter, layer, heads)
    if unigrams is not None:
        UnigramTable.check(unigrams, adapter.model)
    one = _single(paragraph, model, "paragraph")
    view = _one_view(adapter, one, chosen, unigrams)
    if compare is None:
        return view
    two = _single(compare, model, "compare")
    other = _one_view(adapter, two, chosen, unigrams)
    if other.title == view.title:
        other = dataclasses.replace(other, title=f"{view.title}, perturbed")
    return dataclasses.replace(view, compare=other)


def _single(paragraph: Any, model: Any, argument: str) -> Paragraphs:
    found = Paragraphs.of([paragraph] if isinstance(paragraph, str) else paragraph, model, argument)
    if len(found) != 1:
        raise InputError(argument, f"{len(found)} paragraphs", "give one, such as paragraphs[0]")
    return found


def _choose(adapter: Adapter, layer: int | None, heads: Sequence[Head | int] | None) -> list[Head]:
    sequence("heads", heads)
    if layer is not None and not (isinstance(layer, int) and 0 <= layer < adapter.n_layers):
        raise InputError("layer", layer, f"the model has layers 0 to {adapter.n_layers - 1}")
    if heads is None:
        return [h for h in adapter.heads() if layer is None or h.layer == layer]
    chosen = []
    for head in heads:
        if isinstance(head, int):
            if layer is None:
                raise InputError("heads", head, "give layer= too, or Head(layer, head)")
            head = Head(layer, head)
        chosen.append(adapter.check_head(head))
    if not chosen:
        raise InputError("heads", "empty", "name at least one head")
    return chosen


def _one_view(
    adapter: Adapter,
    paragraph: Paragraphs,
    heads: list[Head],
    unigrams: UnigramTable | None,
) -> AttentionView:
    adapter.check_tokens(paragraph.ids, "paragraph")
    ids = paragraph.ids
    layers = sorted({head.layer for head in heads})
    with adapter.preserving_state():
        run = adapter.run(ids, read=[hook_name("pattern", i) for i in layers])
    patterns = torch.stack(
        [run.cache[hook_name("pattern", h.layer)][0, h.head].float() for h in heads]
    )
    log_prob = run.logits[0, :-1].float().log_softmax(-1).cpu()
    of_tokens = log_prob.gather(-1, ids[0, 1:, None])[:, 0]
    strips = {}
    if unigrams is not None:
        strips["unigram rarity"] = Strip((-unigrams.log_prob[ids[0]]).tolist(), "nats")
    strips["log-probability"] = Strip([float("nan"), *of_tokens.tolist()], "nats", reverse=True)
    provenance = Provenance.of(adapter, {"paragraph": paragraph})
    return AttentionView(
        patterns=patterns.cpu(),
        head_names=[str(head) for head in heads],
        tokens=token_texts(adapter, paragraph)[0],
        n_prefix=paragraph.n_prefix,
        strips=strips,
        title=paragraph.names[0],
        provenance={
            "model": provenance.model["name"],
            "basis": provenance.basis,
            "paragraph": paragraph.hash,
            **provenance.versions,
        },
    )


def token_texts(adapter: Adapter, paragraphs: Paragraphs) -> list[list[str]]:
    """Each paragraph's tokens as text; as `<id>` where there is no tokenizer."""
    if adapter.tokenizer is None:
        return [[f"<{i}>" for i in row] for row in paragraphs.ids.tolist()]
    return [paragraphs[i].tokens(adapter.model) for i in range(len(paragraphs))]
