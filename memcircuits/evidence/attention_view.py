"""Show what heads attend to: from a model and a paragraph to an interactive `AttentionView`.

One forward pass reads the attention patterns of the chosen heads. Strips beside the tokens show how
rare each token is and how well the model predicts it. Tokens that the model reads in front of the
paragraph are shown too, as columns of their own named `BOS`: heads that find nothing to attend to
often attend to them (an attention sink). How the page is drawn, and why it is safe and works
offline: see `memcircuits.display.pages`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from memcircuits.base.errors import InputError, sequence
from memcircuits.base.heads import Head, HeadLike
from memcircuits.base.torch_state import plain_torch
from memcircuits.data.paragraphs import Paragraphs, ParagraphsLike
from memcircuits.data.unigrams import UnigramTable
from memcircuits.display.pages import AttentionView, Strip
from memcircuits.models.adapter import Adapter, Model
from memcircuits.models.hooks import hook_name
from memcircuits.models.registry import adapt
from memcircuits.results.provenance import Provenance


@plain_torch()
def attention_view(
    model: Model,
    paragraph: ParagraphsLike | str,
    *,
    layer: int | None = None,
    heads: Sequence[HeadLike | int] | None = None,
    compare: ParagraphsLike | str | None = None,
    unigrams: UnigramTable | None = None,
) -> AttentionView:
    """Attention patterns of some heads on one paragraph, as an interactive view.

    Args:
        model: the model.
        paragraph: one paragraph: `Paragraphs` of one, a string, or ids [1, pos].
        layer: show the heads of this layer.
        heads: which heads: `Head`s of any layer, or indices within `layer`; by default all.
        compare: a second paragraph shown beside it, such as the perturbed one
            (`Perturbation.pairs`); tokens that differ are underlined.
        unigrams: token counts; adds a strip coloured by rarity.

    Returns:
        An `AttentionView`, which notebooks display; `.to_html(path)` writes a page.

    Raises:
        InputError: for a layer or head that the model does not have, or several paragraphs.

    Example:
        >>> view = mc.attention_view(model, memorized[0], layer=1)
        >>> view.patterns.shape  # head, query, key
        torch.Size([8, 100, 100])
    """
    adapter = adapt(model)
    chosen = _choose_heads(adapter, layer, heads)
    if unigrams is not None:
        UnigramTable.check(unigrams, adapter.model)
    view = _view(adapter, _single(paragraph, adapter, "paragraph"), chosen, unigrams)
    if compare is None:
        return view
    other = _view(adapter, _single(compare, adapter, "compare"), chosen, unigrams)
    if other.title == view.title:
        other = dataclasses.replace(other, title=f"{view.title}, perturbed")
    return dataclasses.replace(view, compare=other)


def _single(paragraph: ParagraphsLike | str, adapter: Adapter, argument: str) -> Paragraphs:
    as_list = [paragraph] if isinstance(paragraph, str) else paragraph
    paragraphs = Paragraphs.of(as_list, adapter, argument)
    if len(paragraphs) != 1:
        raise InputError(
            argument, f"{len(paragraphs)} paragraphs", "give one, such as paragraphs[0]"
        )
    return paragraphs


def _choose_heads(
    adapter: Adapter, layer: int | None, heads: Sequence[HeadLike | int] | None
) -> list[Head]:
    """The heads to show, checked."""
    sequence("heads", heads)
    if layer is not None and not (isinstance(layer, int) and 0 <= layer < adapter.n_layers):
        raise InputError("layer", layer, f"the model has layers 0 to {adapter.n_layers - 1}")
    if heads is None:
        return [head for head in adapter.heads() if layer is None or head.layer == layer]
    if not heads:
        raise InputError("heads", "empty", "name at least one head")
    chosen = []
    for value in heads:
        if isinstance(value, int):
            if layer is None:
                raise InputError("heads", value, "give layer= too, or Head(layer, head)")
            value = (layer, value)
        chosen.append(adapter.check_head(value))
    return chosen


def _view(
    adapter: Adapter, paragraph: Paragraphs, heads: Sequence[Head], unigrams: UnigramTable | None
) -> AttentionView:
    adapter.check_tokens(paragraph.inputs, "paragraph")
    ids, n_bos = paragraph.ids, paragraph.n_bos
    names = {head.layer: hook_name("pattern", head.layer) for head in heads}
    with adapter.preserving_state():
        run = adapter.run(paragraph.inputs, read=[names[layer] for layer in sorted(names)])
    patterns = torch.stack([run.cache[names[layer]][0, head].float() for layer, head in heads])

    # Strips over the tokens: those in front are not measured, the first one has no prediction.
    strips = {}
    nan = float("nan")
    if unigrams is not None:
        rarity = (-unigrams.log_prob[ids[0]]).tolist()
        strips["unigram rarity"] = Strip([nan] * n_bos + rarity, "nats")
    n_unpredicted = max(1, n_bos)
    log_prob = run.logits[0, n_unpredicted - 1 : -1].float().log_softmax(-1).cpu()
    predicted = paragraph.inputs[0, n_unpredicted:, None]
    token_log_prob = log_prob.gather(-1, predicted)[:, 0].tolist()
    strips["log-probability"] = Strip([nan] * n_unpredicted + token_log_prob, "nats", reverse=True)

    provenance = Provenance.of(adapter, {"paragraph": paragraph})
    return AttentionView(
        patterns=patterns.cpu(),
        head_names=[str(head) for head in heads],
        tokens=[*front_texts(adapter, paragraph), *token_texts(adapter, paragraph)[0]],
        n_prefix=paragraph.n_given,
        strips=strips,
        title=paragraph.names[0],
        provenance={
            "model": provenance.model["name"],
            "basis": provenance.basis,
            "paragraph": paragraph.hash,
            **provenance.versions,
        },
    )


def front_texts(adapter: Adapter, paragraph: Paragraphs) -> list[str]:
    """The tokens in front as labels: OPT's is `</s>`, which would not be recognised."""
    if not paragraph.bos:
        return []
    front = Paragraphs(torch.tensor([[*paragraph.bos, 0]]), paragraph.n_bos)
    return [f"BOS {text}" for text in token_texts(adapter, front)[0][:-1]]


def token_texts(adapter: Adapter, paragraphs: Paragraphs) -> list[list[str]]:
    """Each paragraph's tokens as text; as `<id>` where there is no tokenizer."""
    if adapter.tokenizer is None:
        return [[f"<{i}>" for i in row] for row in paragraphs.ids.tolist()]
    return [paragraphs[i].tokens(adapter.model) for i in range(len(paragraphs))]
