"""Exact head interventions, several times sooner than one full forward pass each.

An edit of one head at layer l changes nothing below l. So:

1. one clean run records, for every layer, the residual stream that enters the block, what its
   attention answered and each head's z;
2. replacing head h's z by z' changes the attention's answer by exactly (z' - z) @ W_O[h];
3. block l is run on its recorded input with its attention answering that sum (the attention itself
   is not computed again), then the blocks above, many edits in one batch;
4. only the positions that predict the continuation are unembedded.

The block's own code runs, so parallel blocks, norms after attention, local windows and grouped
queries need no special case. Where a model cannot be continued in the middle
(`Adapter.can_restart`), every edit takes a full forward pass and the result says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memcircuits.adapter import Adapter, hook_z
from memcircuits.measure import read_continuation
from memcircuits.memory import in_pieces, rows_that_fit

FALLBACK = "this model cannot be continued in the middle: every edit took a full forward pass"
Measure = Callable[[Float[Tensor, "row pos d_vocab"], Int[Tensor, " row"]], Tensor]


@dataclass(frozen=True)
class HeadEdit:
    """Replace the z of some heads of one layer.

    Attributes:
        heads: the heads replaced.
        z: their new values, [row, pos, head, d_head]; a size of 1 broadcasts over rows or
            positions.
    """

    heads: tuple[int, ...]
    z: Tensor


class Restart:
    """A clean run of some paragraphs that can be continued at any layer under head edits.

    Args:
        adapter: the model.
        ids: whole paragraphs.
        n_prefix: tokens of the prefix; logits are taken where they predict the rest.
        memory_budget: bytes for one batch of continued rows.
    """

    def __init__(
        self,
        adapter: Adapter,
        ids: Int[Tensor, "row pos"],
        n_prefix: int,
        memory_budget: int | None = None,
    ) -> None:
        self.adapter = adapter
        self.targets = ids[:, n_prefix:].to(adapter.device)
        self.inputs = ids[:, :-1].to(adapter.device)  # the last token predicts nothing
        self.positions = slice(n_prefix - 1, None)
        self.restarts = adapter.can_restart
        self._rows = rows_that_fit(
            adapter, self.inputs.shape[1], self.targets.shape[1], memory_budget
        )
        layers = range(adapter.n_layers)
        read = [hook_z(i) for i in layers]
        if self.restarts:
            with adapter.recording() as recorded:
                run = adapter.run(self.inputs, positions=self.positions, read=read)
            self.resid_pre, self.attn_out = recorded.resid_pre, recorded.attn_out
        else:
            run = adapter.run(self.inputs, positions=self.positions, read=read)
        self.logits = run.logits
        self.z = [run.cache[name] for name in read]

    def continuation(
        self, logits: Float[Tensor, "row pos d_vocab"], rows: Int[Tensor, " row"]
    ) -> Float[Tensor, "row measure"]:
        """The default measure: NLL (nats/token) and EM (tokens) of the true continuation."""
        found = read_continuation(logits, self.targets[rows])
        return torch.stack([found.nll, found.em.float()], dim=-1)

    def clean(self, measure: Measure | None = None) -> Float[Tensor, "row measure"]:
        """The measure of the unedited run."""
        rows = torch.arange(len(self.inputs), device=self.inputs.device)
        return (measure or self.continuation)(self.logits, rows)

    def edited(
        self, layer: int, edits: Sequence[HeadEdit], measure: Measure | None = None
    ) -> Float[Tensor, "edit row measure"]:
        """Measure every edit of `layer` on every paragraph, each edit by itself."""
        n = len(self.inputs)
        step = self._restarted if self.restarts else self._in_full
        found = in_pieces(
            len(edits) * n, self._rows, partial(step, layer, edits, measure or self.continuation)
        )
        return found.view(len(edits), n, -1)

    def _restarted(
        self, layer: int, edits: Sequence[HeadEdit], measure: Measure, piece: slice
    ) -> Tensor:
        which, rows = self._index(piece)
        w_o = self.adapter.weight(layer, "W_O").values
        attn_out = self.attn_out[layer][rows].clone()
        for e in which.unique().tolist():
            mine = which == e
            heads = list(edits[e].heads)
            new = self._rows_of(edits[e].z, rows[mine])
            change = new - self.z[layer][rows[mine]][:, :, heads]
            attn_out[mine] += torch.einsum("rphd,hdm->rpm", change.to(w_o.dtype), w_o[heads])
        with self.adapter.attention_answers(layer, attn_out):
            resid = self.adapter.run_blocks(layer, self.resid_pre[layer][rows])
        return measure(self.adapter.unembed(resid[:, self.positions]), rows)

    def _in_full(
        self, layer: int, edits: Sequence[HeadEdit], measure: Measure, piece: slice
    ) -> Tensor:
        which, rows = self._index(piece)

        def edit(z: Tensor) -> Tensor:
            z = z.clone()
            for e in which.unique().tolist():
                mine = torch.nonzero(which == e).flatten()
                for i, head in enumerate(edits[e].heads):
                    z[mine, :, head] = self._rows_of(edits[e].z, rows[mine])[:, :, i].to(z.dtype)
            return z

        run = self.adapter.run(
            self.inputs[rows], positions=self.positions, edit={hook_z(layer): edit}
        )
        return measure(run.logits, rows)

    def _index(self, piece: slice) -> tuple[Tensor, Tensor]:
        flat = torch.arange(piece.start, piece.stop, device=self.inputs.device)
        return flat // len(self.inputs), flat % len(self.inputs)

    @staticmethod
    def _rows_of(z: Tensor, rows: Tensor) -> Tensor:
        return z if z.shape[0] == 1 else z[rows]
