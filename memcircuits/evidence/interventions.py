"""Exact interventions on one layer, several times faster than one full forward pass each.

An edit of layer l changes nothing below l, and only the continuation is scored. The algorithm:

1. One clean run records, for every layer, the residual stream that enters the block (`resid_pre`),
   the output of its attention (`attn_out`) and the z of every head.
2. Replacing the z of head h by z' changes the attention output by exactly (z' - z) @ W_O[h].
3. A *partial forward* starts at layer l (`start_at_layer` in TransformerLens): block l runs on its
   recorded input, with the changed attention output in place of the attention, which is not
   computed again; then the blocks above run, many edits in one batch.
4. Only the positions that predict the continuation pass through the MLP of the last block and are
   unembedded, and their logits are scored while still in the CPU cache.

Any other activation of block l (`ResumableRun.patched`) is replaced by a hook in a partial forward
from layer l. One exception: on a Bridge, a write to `hook_resid_mid` reaches the MLP but not the
residual stream beside it. A change of resid_mid therefore enters as a change of the block's input
while its attention output is held at its clean value.

The block's own code runs, so parallel blocks, norms after attention, local windows and grouped
queries need no special case. Where a model does not support partial forwards
(`Adapter.supports_partial_forward`), every edit takes a full forward pass and the result says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.base.errors import UnsupportedModel
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.evidence.activation_edits import HeadEdit, RowsEdit
from memcircuits.measure.continuation import read_continuation
from memcircuits.models.adapter import Adapter
from memcircuits.models.batching import logits_that_fit, map_batches, rows_that_fit
from memcircuits.models.hooks import ActivationEdit, hook_name

FALLBACK = "this model cannot be continued in the middle: every edit took a full forward pass"
"""The note of results for which every edit took a full forward pass."""

Measure: TypeAlias = Callable[[Float[Tensor, "batch pos d_vocab"], Int[Tensor, " batch"]], Tensor]
"""From the logits that predict the continuation, and the indices of their paragraphs, to numbers
[batch, measure]."""


class ResumableRun:
    """A clean run of some paragraphs, from any layer of which a forward pass can resume.

    Args:
        adapter: the model.
        paragraphs: the paragraphs; the logits that predict their continuations are scored.
        memory_budget: maximum bytes per batch of resumed rows.
        read: names of further activations of the clean run to keep in `cache`.

    Attributes:
        inputs: the token ids that are run, [batch, pos]: `Paragraphs.inputs` but the last token,
            which predicts nothing. Activations, edits and masks have the positions of `inputs`.
        targets: the continuation, [batch, pos].
        z: the z of every layer, [batch, pos, head, d_head] each.
        cache: the activations asked for by `read`.
        partial_forward: whether edits take partial forwards; if not, they take full ones.
    """

    def __init__(
        self,
        adapter: Adapter,
        paragraphs: Paragraphs,
        memory_budget: int | None = None,
        *,
        read: Sequence[str] = (),
    ) -> None:
        self.adapter = adapter
        self.targets = paragraphs.continuation.to(adapter.device)
        self.inputs = paragraphs.inputs[:, :-1].to(adapter.device)
        self.positions = slice(paragraphs.n_given - 1, None)
        self.partial_forward = adapter.supports_partial_forward
        self._all_rows = torch.arange(len(paragraphs), device=adapter.device)
        self._batch_size = rows_that_fit(adapter, self.inputs.shape[1], 0, memory_budget)
        self._unembed_size = logits_that_fit(adapter, self.targets.shape[1], memory_budget)
        self._last_layer = adapter.n_layers - 1
        z_names = [hook_name("z", layer) for layer in range(adapter.n_layers)]
        if self.partial_forward:
            final = hook_name("resid_post", self._last_layer)
            with adapter.recording() as recorded:
                run = adapter.run(
                    self.inputs, positions=slice(-1, None), read=[*z_names, *read, final]
                )
            self.resid_pre, self.attn_out = recorded.resid_pre, recorded.attn_out
            self._clean_final_resid = run.cache[final][:, self.positions]
        else:
            run = adapter.run(self.inputs, positions=self.positions, read=[*z_names, *read])
            self._clean_logits = run.logits
        self.z = [run.cache[name] for name in z_names]
        self.cache = {name: run.cache[name] for name in read}

    def score_continuation(
        self, logits: Float[Tensor, "batch pos d_vocab"], rows: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch measure"]:
        """The default measure: NLL (nats/token) and EM (tokens) of the true continuation."""
        scores = read_continuation(logits, self.targets[rows])
        return torch.stack([scores.nll, scores.em.float()], dim=-1)

    def clean(self, measure: Measure | None = None) -> Float[Tensor, "batch measure"]:
        """The measure of the unedited run."""
        measure = measure or self.score_continuation
        if not self.partial_forward:
            return measure(self._clean_logits, self._all_rows)
        return self._unembed_and_measure(self._clean_final_resid, self._all_rows, measure)

    def edited(
        self, layer: int, edits: Sequence[HeadEdit], measure: Measure | None = None
    ) -> Float[Tensor, "edit batch measure"]:
        """Measure every edit of `layer` on every paragraph, each edit by itself."""
        n, measure = len(self.inputs), measure or self.score_continuation
        if not self.partial_forward:
            return torch.stack([self._edit_fully(layer, edit, measure) for edit in edits])
        run_batch = partial(self._edit_partially, layer, edits, measure)
        results = map_batches(len(edits) * n, self._batch_size, run_batch)
        return results.view(len(edits), n, -1)

    def rerun(
        self,
        layer: int | None = None,
        *,
        keep_attention: bool = False,
        measure: Measure | None = None,
    ) -> Float[Tensor, "batch measure"]:
        """Measure every paragraph with the weights that the model has now.

        Args:
            layer: the lowest block whose weights are others than those of the clean run; None if
                other weights are, too, or this model does not support partial forwards.
            keep_attention: whether the attention of that block has the weights of the clean run.
            measure: what to measure, by default NLL and EM.
        """
        work = partial(self._rerun_batch, layer, keep_attention, measure or self.score_continuation)
        return map_batches(len(self.inputs), self._batch_size, work)

    def _rerun_batch(
        self, layer: int | None, keep_attention: bool, measure: Measure, batch: slice
    ) -> Float[Tensor, "batch measure"]:
        rows = self._all_rows[batch]
        if layer is None or not self.partial_forward:
            return measure(
                self.adapter.run(self.inputs[rows], positions=self.positions).logits, rows
            )
        resid = self.resid_pre[layer][rows]
        if keep_attention:
            attn_out = self.attn_out[layer][rows]
        else:
            attn_out = self.adapter.attention_output(layer, resid)
        final_resid = self._resume_after_attention(layer, resid, attn_out)
        return self._unembed_and_measure(final_resid, rows, measure)

    def patched(
        self,
        layer: int,
        name: str,
        source: Float[Tensor, "batch pos *rest"],
        masks: Bool[Tensor, "edit batch pos *rest"],
        measure: Measure | None = None,
    ) -> Float[Tensor, "edit batch measure"]:
        """Replace an activation of `layer` by `source` where a mask is True, each mask by itself.

        Args:
            layer: the block that holds the activation.
            name: name of the activation; this run must have read `blocks.L.hook_resid_mid` for it
                to be patched.
            source: its new values.
            masks: where they replace the old ones, without the activation's last axis. Paragraphs
                without a True in a mask keep their clean values and are not run.
            measure: what to measure, by default NLL and EM.

        Raises:
            UnsupportedModel: for resid_mid, if the model does not support partial forwards.
        """
        if name.endswith("hook_resid_mid") and not self.partial_forward:
            raise UnsupportedModel("site", "resid_mid", FALLBACK + "; patch another site")
        measure = measure or self.score_continuation
        masks = masks.expand(-1, len(self.inputs), *masks.shape[2:])
        results = self.clean(measure).expand(len(masks), -1, -1).clone()
        patched_pairs = masks.flatten(2).any(-1).nonzero()  # (mask, paragraph)
        if len(patched_pairs):
            run_batch = partial(
                self._patch_batch, layer, name, source, masks, measure, patched_pairs
            )
            values = map_batches(len(patched_pairs), self._batch_size, run_batch)
            results[patched_pairs[:, 0], patched_pairs[:, 1]] = values.to(results.dtype)
        return results

    def _patch_batch(
        self,
        layer: int,
        name: str,
        source: Tensor,
        masks: Tensor,
        measure: Measure,
        pairs: Int[Tensor, "pair 2"],
        batch: slice,
    ) -> Float[Tensor, "batch measure"]:
        """Run some of the (mask, paragraph) pairs of `patched`."""
        mask_index, rows = pairs[batch].unbind(-1)
        mask, new = masks[mask_index, rows].unsqueeze(-1), source[rows]

        def edit(old: Tensor) -> Tensor:
            return torch.where(mask, new.to(old.dtype), old)

        if not name.endswith("hook_resid_mid"):
            return self._resume(layer, {name: edit}, measure, rows)
        # The change enters beside the attention, whose output is held at its clean value.
        resid_mid = self.cache[name][rows]
        resid = self.resid_pre[layer][rows] + (edit(resid_mid) - resid_mid)
        final_resid = self._resume_after_attention(layer, resid, self.attn_out[layer][rows])
        return self._unembed_and_measure(final_resid, rows, measure)

    def hooked(
        self, layer: int, edits: Mapping[str, RowsEdit], measure: Measure | None = None
    ) -> Float[Tensor, "batch measure"]:
        """Measure every paragraph with activations edited.

        Args:
            layer: the lowest block with an edited activation.
            edits: activation name -> its edit.
            measure: what to measure, by default NLL and EM.
        """

        def run_batch(batch: slice) -> Float[Tensor, "batch measure"]:
            rows = self._all_rows[batch]
            edit = {name: _of_rows(function, rows) for name, function in edits.items()}
            return self._resume(layer, edit, measure or self.score_continuation, rows)

        return map_batches(len(self.inputs), self._batch_size, run_batch)

    def _resume(
        self,
        layer: int,
        edit: Mapping[str, ActivationEdit],
        measure: Measure,
        rows: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch measure"]:
        """Run some paragraphs from block `layer`, with edits there and above."""
        if not self.partial_forward:
            run = self.adapter.run(self.inputs[rows], positions=self.positions, edit=edit)
            return measure(run.logits, rows)
        resid, last = self.resid_pre[layer][rows], self._last_layer
        if any(name.startswith(f"blocks.{last}.") for name in edit):
            # A hook is in the last block, so its whole width has to run.
            final_resid = self.adapter.run_blocks(layer, resid, edit=edit)[:, self.positions]
        else:
            resid = self.adapter.run_blocks(layer, resid, last, edit=edit)
            attn_out = self.adapter.attention_output(last, resid)
            final_resid = self._resume_after_attention(last, resid, attn_out)
        return self._unembed_and_measure(final_resid, rows, measure)

    def _edit_partially(
        self, layer: int, edits: Sequence[HeadEdit], measure: Measure, batch: slice
    ) -> Float[Tensor, "batch measure"]:
        """Run some of the (edit, paragraph) pairs of `edited` by a partial forward."""
        w_o = self.adapter.weight(layer, "W_O").matrix.to(self.adapter.device)
        rows_of_edit = self._split_by_edit(batch)
        rows = torch.cat([self._all_rows[edit_rows] for _, edit_rows in rows_of_edit])
        attn_out = []
        for index, edit_rows in rows_of_edit:
            heads = list(edits[index].heads)
            new_z = self._select_rows(edits[index].z, edit_rows)
            old_z, new_w_o = self.z[layer][edit_rows][:, :, heads], edits[index].w_o
            if new_w_o is None:
                change = _times_w_o(new_z - old_z, w_o[heads])
            else:
                change = _times_w_o(new_z, new_w_o) - _times_w_o(old_z, w_o[heads])
            attn_out.append(self.attn_out[layer][edit_rows] + change)
        final_resid = self._resume_after_attention(
            layer, self.resid_pre[layer][rows], torch.cat(attn_out)
        )
        return self._unembed_and_measure(final_resid, rows, measure)

    def _edit_fully(
        self, layer: int, edit: HeadEdit, measure: Measure
    ) -> Float[Tensor, "batch measure"]:
        """Measure one edit on every paragraph by full forward passes."""
        if edit.w_o is not None:
            raise UnsupportedModel("model", self.adapter.label, FALLBACK + "; it keeps its W_O")

        def replace_z(z: Tensor, rows: Int[Tensor, " batch"]) -> Tensor:
            z = z.clone()
            z[:, :, list(edit.heads)] = self._select_rows(edit.z, rows).to(z.dtype)
            return z

        return self.hooked(layer, {hook_name("z", layer): replace_z}, measure)

    def _resume_after_attention(
        self,
        layer: int,
        resid_pre: Float[Tensor, "batch pos d_model"],
        attn_out: Float[Tensor, "batch pos d_model"],
    ) -> Float[Tensor, "batch predicting d_model"]:
        """Run from the given attention output of block `layer` to the end of the last block.

        Nothing reads the other positions of the last block, so its MLP runs only on the positions
        that are unembedded.
        """
        last = self._last_layer
        if layer < last:
            with self.adapter.override_attention_output(layer, attn_out):
                resid_pre = self.adapter.run_blocks(layer, resid_pre, last)
            attn_out = self.adapter.attention_output(last, resid_pre)
        with self.adapter.override_attention_output(last, attn_out[:, self.positions]):
            return self.adapter.run_blocks(last, resid_pre[:, self.positions])

    def _unembed_and_measure(
        self,
        final_resid: Float[Tensor, "batch pos d_model"],
        rows: Int[Tensor, " batch"],
        measure: Measure,
    ) -> Float[Tensor, "batch measure"]:
        """Unembed the last block's output and measure it, in batches of `_unembed_size` rows."""
        return map_batches(
            len(rows),
            self._unembed_size,
            lambda batch: measure(self.adapter.unembed(final_resid[batch]), rows[batch]),
        )

    def _split_by_edit(self, batch: slice) -> list[tuple[int, slice]]:
        """The edits in a batch of all (edit, paragraph) pairs, and the paragraphs of each."""
        n = len(self.inputs)
        first_edit, last_edit = batch.start // n, (batch.stop - 1) // n
        return [
            (edit, slice(max(batch.start - edit * n, 0), min(batch.stop - edit * n, n)))
            for edit in range(first_edit, last_edit + 1)
        ]

    @staticmethod
    def _select_rows(z: Tensor, rows: slice | Int[Tensor, " batch"]) -> Tensor:
        """The z of some paragraphs; a z of size 1 is the same for all."""
        return z if z.shape[0] == 1 else z[rows]


def _times_w_o(
    z: Float[Tensor, "batch pos head d_head"], w_o: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """What heads add to the residual stream."""
    return torch.einsum("rphd,hdm->rpm", z.to(w_o.dtype), w_o)


def _of_rows(function: RowsEdit, rows: Int[Tensor, " batch"]) -> ActivationEdit:
    return lambda activation: function(activation, rows)
