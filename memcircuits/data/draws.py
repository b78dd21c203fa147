"""Random draws and splits of paragraphs, with groups of dependent paragraphs kept in mind.

A draw takes a second paragraph of a group only when every group has one: copies must not displace
other paragraphs. A split puts a group on one side: what is chosen on one side and reported on the
other would otherwise be reported on what it was chosen from. Where every paragraph is a group of
its own, these are the ordinary draws and splits.

`groups` is the number of each paragraph's group (`Paragraphs.groups`).
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from memcircuits.base.errors import InputError
from memcircuits.base.statistics import count_groups, turns_in_groups


def random_order(
    groups: Int[Tensor, " paragraph"], generator: torch.Generator
) -> Int[Tensor, " paragraph"]:
    """All indices in a random order: one of each group, then a second of each, and so on."""
    order = torch.randperm(len(groups), generator=generator)
    turns, _ = turns_in_groups(groups[order])
    return order[turns.argsort(stable=True)]


def sample_rows(
    groups: Int[Tensor, " paragraph"], n: int, generator: torch.Generator
) -> Int[Tensor, " drawn"]:
    """`n` indices without replacement, ascending, from as many groups as possible."""
    return random_order(groups, generator)[:n].sort().values


def first_rows(groups: Int[Tensor, " paragraph"]) -> Int[Tensor, " group"]:
    """Index of the first paragraph of each group, ascending: these are independent."""
    turns, _ = turns_in_groups(groups)
    return (turns == 0).nonzero().flatten()


def split_groups(
    groups: Int[Tensor, " paragraph"], order: Int[Tensor, " drawn"], n_groups: int
) -> tuple[Int[Tensor, " first"], Int[Tensor, " second"]]:
    """Split drawn paragraphs so that no group is on both sides.

    Args:
        groups: number of the group of each paragraph.
        order: indices of the paragraphs that are split.
        n_groups: number of groups on the first side: those that come first in the order.

    Returns:
        The indices on either side, in the order given.

    Raises:
        InputError: if all the paragraphs are of one group; they are controls wherever one splits.
    """
    drawn = groups[order]
    if count_groups(drawn) < 2:
        raise InputError(
            "control",
            f"{len(drawn)} paragraphs that are copies or parts of one document",
            "some are held out, which must be independent: give others, or a column `group`",
        )
    first = torch.tensor(list(dict.fromkeys(drawn.tolist()))[:n_groups])
    is_first = torch.isin(drawn, first)
    return order[is_first], order[~is_first]
