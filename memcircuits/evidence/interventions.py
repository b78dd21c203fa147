"""Exact head interventions, several times sooner than one full forward pass each.

An edit of one head at layer l changes nothing below l. So:

1. one clean run records, for every layer, the residual stream that enters the block, what its
   attention answered and each head's z;
2. replacing head h's z by z' changes the attention's answer by exactly (z' - z) @ W_O[h];
3. block l is run on its recorded input with its attention answering that sum (the attention itself
   is not computed again), then the blocks above, many edits in one batch;
4. only the positions that predict the continuation go through the MLP of the last block and are
   unembedded, and their logits are read while the processor still has them at hand.

Any other activation of block l (`ResumableRun.patched`) is replaced by a hook while the block and those
above run on the recorded input. One exception: on a Bridge a write to `hook_resid_mid` reaches the
MLP but not the residual stream beside it, so a change of resid_mid enters as a change of the
block's input while its attention answers what it answered before.

The block's own code runs, so parallel blocks, norms after attention, local windows and grouped
queries need no special case. Where a model cannot be continued in the middle
(`Adapter.supports_partial_forward`), every edit takes a full forward pass and the result says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.core.errors import UnsupportedModel
from memcircuits.measure.continuation import read_continuation
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import logits_that_fit, map_batches, rows_that_fit
from memcircuits.models.hooks import hook_z

FALLBACK = "this model cannot be continued in the middle: every edit took a full forward pass"


Measure = Callable[[Float[Tensor, "batch pos d_vocab"], Int[Tensor, " batch"]], Tensor]


@dataclass(frozen=True)
class HeadEdit:
    """Replace the z of some heads of one layer.

    Attributes:
        heads: the heads replaced.
        z: their new values, [batch, pos, head, d_head]; a size of 1 broadcasts over rows or
            positions.
    """

    heads: tuple[int, ...]
    z: Tensor


class ResumableRun:
    """A clean run of some paragraphs that can be continued at any layer under head edits.

    Args:
        adapter: the model.
        ids: whole paragraphs.
        n_prefix: tokens of the prefix; logits are taken where they predict the rest.
        memory_budget: bytes for one batch of continued rows.
        read: names of further activations of the clean run to keep in `cache`.
    """

    def __init__(
        self,
        adapter: Adapter,
        ids: Int[Tensor, "batch pos"],
        n_prefix: int,
        memory_budget: int | None = None,
        *,
        read: Sequence[str] = (),
    ) -> None:
        self.adapter = adapter
        self.targets = ids[:, n_prefix:].to(adapter.device)
        self.inputs = ids[:, :-1].to(adapter.device)  # the last token predicts nothing
        self.positions = slice(n_prefix - 1, None)
        self._all = torch.arange(len(ids), device=adapter.device)
        self.restarts = adapter.supports_partial_forward
        self._rows = rows_that_fit(adapter, self.inputs.shape[1], 0, memory_budget)
        self._logit_rows = logits_that_fit(adapter, self.targets.shape[1], memory_budget)
        self._last = adapter.n_layers - 1
        z = [hook_z(layer) for layer in range(adapter.n_layers)]
        if self.restarts:
            final = f"blocks.{self._last}.hook_resid_post"
            with adapter.recording() as recorded:
                run = adapter.run(self.inputs, positions=slice(-1, None), read=[*z, *read, final])
            self.resid_pre, self.attn_out = recorded.resid_pre, recorded.attn_out
            self._final = run.cache[final][:, self.positions]
        else:
            run = adapter.run(self.inputs, positions=self.positions, read=[*z, *read])
            self._logits = run.logits
        self.z = [run.cache[name] for name in z]
        self.cache = {name: run.cache[name] for name in read}

    def continuation(
        self, logits: Float[Tensor, "batch pos d_vocab"], rows: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch measure"]:
        """The default measure: NLL (nats/token) and EM (tokens) of the true continuation."""
        found = read_continuation(logits, self.targets[rows])
        return torch.stack([found.nll, found.em.float()], dim=-1)

    def clean(self, measure: Measure | None = None) -> Float[Tensor, "batch measure"]:
        """The measure of the unedited run."""
        measure = measure or self.continuation
        if not self.restarts:
            return measure(self._logits, self._all)
        return self._measured(self._final, self._all, measure)

    def edited(
        self, layer: int, edits: Sequence[HeadEdit], measure: Measure | None = None
    ) -> Float[Tensor, "edit batch measure"]:
        """Measure every edit of `layer` on every paragraph, each edit by itself."""
        n = len(self.inputs)
        step = self._restarted if self.restarts else self._in_full
        found = map_batches(
            len(edits) * n, self._rows, partial(step, layer, edits, measure or self.continuation)
        )
        return found.view(len(edits), n, -1)

    def patched(
        self,
        layer: int,
        name: str,
        source: Float[Tensor, "batch pos *rest"],
        masks: Bool[Tensor, "edit batch pos *rest"],
        measure: Measure | None = None,
    ) -> Float[Tensor, "edit batch measure"]:
        """Replace an activation of `layer` by `source` where a mask says so, each mask by itself.

        Args:
            layer: the block that holds the activation.
            name: activation; `blocks.L.hook_resid_mid` must have been read by this restart.
            source: its new values.
            masks: where they replace the old ones, without the activation's last axis. Rows that a
                mask leaves out are not run.
            measure: what to measure, by default NLL and EM.

        Raises:
            UnsupportedModel: for resid_mid, if the model cannot be continued in the middle.
        """
        if name.endswith("hook_resid_mid") and not self.restarts:
            raise UnsupportedModel("site", "resid_mid", FALLBACK + "; patch another site")
        measure = measure or self.continuation
        masks = masks.expand(-1, len(self.inputs), *masks.shape[2:])
        found = self.clean(measure).expand(len(masks), -1, -1).clone()
        live = masks.flatten(2).any(-1).nonzero()
        if len(live):
            step = partial(self._patched, layer, name, source, masks, measure, live)
            new = map_batches(len(live), self._rows, step)
            found[live[:, 0], live[:, 1]] = new.to(found.dtype)
        return found

    def _patched(
        self,
        layer: int,
        name: str,
        source: Tensor,
        masks: Tensor,
        measure: Measure,
        live: Int[Tensor, "run 2"],
        piece: slice,
    ) -> Tensor:
        which, rows = live[piece].unbind(-1)
        mask, new = masks[which, rows].unsqueeze(-1), source[rows]

        def edit(old: Tensor) -> Tensor:
            return torch.where(mask, new.to(old.dtype), old)

        if not self.restarts:
            run = self.adapter.run(self.inputs[rows], positions=self.positions, edit={name: edit})
            return measure(run.logits, rows)
        resid = self.resid_pre[layer][rows]
        if name.endswith("hook_resid_mid"):
            middle = self.cache[name][rows]
            resid = resid + (edit(middle) - middle)
            final = self._finish(layer, resid, self.attn_out[layer][rows])
        elif layer < self._last:
            resid = self.adapter.run_blocks(layer, resid, self._last, edit={name: edit})
            final = self._finish(
                self._last, resid, self.adapter.attention_output(self._last, resid)
            )
        else:
            resid = self.adapter.run_blocks(layer, resid, edit={name: edit})
            final = resid[:, self.positions]
        return self._measured(final, rows, measure)

    def _restarted(
        self, layer: int, edits: Sequence[HeadEdit], measure: Measure, piece: slice
    ) -> Tensor:
        w_o = self.adapter.weight(layer, "W_O").values
        spans = self._spans(piece)
        rows = torch.cat([self._all[rows] for _, rows in spans])
        answers = []
        for e, mine in spans:
            heads = list(edits[e].heads)
            change = self._rows_of(edits[e].z, mine) - self.z[layer][mine][:, :, heads]
            change = torch.einsum("rphd,hdm->rpm", change.to(w_o.dtype), w_o[heads])
            answers.append(self.attn_out[layer][mine] + change)
        final = self._finish(layer, self.resid_pre[layer][rows], torch.cat(answers))
        return self._measured(final, rows, measure)

    def _finish(
        self,
        layer: int,
        resid: Float[Tensor, "batch pos d_model"],
        attn_out: Float[Tensor, "batch pos d_model"],
    ) -> Float[Tensor, "batch predicting d_model"]:
        """From the attention of block `layer` to the end, at the positions that are unembedded.

        Nothing reads the other positions of the last block: its MLP does not run on them.
        """
        if layer < self._last:
            with self.adapter.override_attention_output(layer, attn_out):
                resid = self.adapter.run_blocks(layer, resid, self._last)
            attn_out = self.adapter.attention_output(self._last, resid)
        with self.adapter.override_attention_output(self._last, attn_out[:, self.positions]):
            return self.adapter.run_blocks(self._last, resid[:, self.positions])

    def _in_full(
        self, layer: int, edits: Sequence[HeadEdit], measure: Measure, piece: slice
    ) -> Tensor:
        spans = self._spans(piece)
        rows = torch.cat([self._all[rows] for _, rows in spans])

        def edit(z: Tensor) -> Tensor:
            z, start = z.clone(), 0
            for e, mine in spans:
                stop = start + mine.stop - mine.start
                z[start:stop, :, list(edits[e].heads)] = self._rows_of(edits[e].z, mine).to(z.dtype)
                start = stop
            return z

        run = self.adapter.run(
            self.inputs[rows], positions=self.positions, edit={hook_z(layer): edit}
        )
        return measure(run.logits, rows)

    def _measured(
        self,
        final: Float[Tensor, "batch pos d_model"],
        rows: Int[Tensor, " batch"],
        measure: Measure,
    ) -> Float[Tensor, "batch measure"]:
        """Unembed the last block's output and measure, as many rows as can be read at once."""
        return map_batches(
            len(rows),
            self._logit_rows,
            lambda piece: measure(self.adapter.unembed(final[piece]), rows[piece]),
        )

    def _spans(self, piece: slice) -> list[tuple[int, slice]]:
        """The edits in a piece of all (edit, paragraph) pairs, and the paragraphs of each."""
        n = len(self.inputs)
        return [
            (e, slice(max(piece.start - e * n, 0), min(piece.stop - e * n, n)))
            for e in range(piece.start // n, (piece.stop - 1) // n + 1)
        ]

    @staticmethod
    def _rows_of(z: Tensor, rows: slice) -> Tensor:
        return z if z.shape[0] == 1 else z[rows]
