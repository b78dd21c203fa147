"""What a reader must know about tokens in front: were paragraphs read as in training?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memcircuits.data.bos import default_bos
from memcircuits.models.adapter import Adapter
from memcircuits.models.bos_probe import LARGE_GAIN
from memcircuits.models.registry import validate_model

if TYPE_CHECKING:
    from memcircuits.data.paragraphs import Paragraphs


def bos_of_model(adapter: Adapter) -> dict[str, Any]:
    """What a provenance keeps about a model's tokens in front.

    Returns:
        `bos`: ids that its tokenizer puts in front by default; `bos_gain`: by how much BOS lowers
        the NLL of a few sentences, nats/token (`memcircuits.models.bos_probe`).
    """
    bos = default_bos(adapter) if adapter.tokenizer is not None else ()
    return {"bos": list(bos), "bos_gain": validate_model(adapter).bos_gain}


def bos_of_paragraphs(adapter: Adapter, paragraphs: Paragraphs) -> dict[str, Any]:
    """What a provenance keeps about the tokens in front of some paragraphs.

    Returns:
        `bos`: their ids; `as_trained`: whether the model read every paragraph behind what its
        tokenizer puts in front, in `bos` or at the beginning of the ids.
    """
    default = bos_of_model(adapter)["bos"]
    begins = paragraphs.inputs[:, : len(default)].tolist()
    return {
        "bos": list(paragraphs.bos),
        "as_trained": all(beginning == default for beginning in begins),
    }


def bos_notes(model: Mapping[str, Any], paragraphs: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes about the parts `model` and `paragraphs` of a provenance; none for older ones."""
    default, gain = model.get("bos"), model.get("bos_gain") or 0.0
    if default and not all(group.get("as_trained", True) for group in paragraphs.values()):
        return (
            f"the model's tokenizer puts {_named(default)} in front of every text, and these "
            "paragraphs were read without: the model may know them better than the numbers say",
        )
    is_bare = any(group.get("bos") == [] for group in paragraphs.values())
    if default == [] and is_bare and gain > LARGE_GAIN:
        return (
            f"behind BOS this model's NLL of a few sentences is {gain:.2f} nats/token lower, but "
            "its tokenizer puts nothing in front: compare with bos=True (--bos yes)",
        )
    return ()


def _named(ids: list[int]) -> str:
    return f"token {ids[0]} (BOS)" if len(ids) == 1 else f"tokens {ids}"
