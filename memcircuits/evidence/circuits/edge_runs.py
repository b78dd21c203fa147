"""Run a model in which a component reads only some of the others.

The *reference* is another text: with an edge from u to v removed, v reads what u writes on the
reference. All components are computed in order. A node v reads

    stream of the reference + sum over kept edges u -> v of (output of u - its output there)

where the output of u is the one of this run, and v computes its output from that by the model's own
code. With all edges this is the run on the paragraph, with none that on the reference; with all
edges but one it is exact path patching of that edge (Wang et al. 2023, arXiv 2211.00593; Goldowsky-
Dill et al. 2023, arXiv 2304.05969). Nodes with the same edges share their computation, and nodes
without an edge write what they write on the reference.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.evidence.circuits.graph import Edges, Graph
from memcircuits.models.adapter import Adapter
from memcircuits.models.hooks import hook_name


class EdgeRuns:
    """A paragraph and references, and runs of the model between them.

    Args:
        adapter: a model that supports partial forwards and adds its components up.
        paragraph: one paragraph.
        reference_ids: other texts of its length, token ids [reference, pos].

    Attributes:
        graph: the edges.
        clean: output of every component on the paragraph, [component, pos, d_model].
        reference: the same on each reference, [reference, component, pos, d_model].
        embedded: what enters the first block: the paragraph, then each reference.
        in_class: which positions each class has, [class, pos].
    """

    def __init__(
        self, adapter: Adapter, paragraph: Paragraphs, reference_ids: Int[Tensor, "reference pos"]
    ) -> None:
        self.adapter = adapter
        self.graph = Graph(adapter.n_layers, adapter.n_heads, adapter.parallel)
        self.targets = paragraph.continuation.to(adapter.device)
        self.predicting = slice(paragraph.n_given - 1, None)
        bos = torch.tensor(paragraph.bos, dtype=torch.long).expand(len(reference_ids), -1)
        references = torch.cat([bos, reference_ids], 1)
        ids = torch.cat([paragraph.inputs, references])[:, :-1]
        layers = range(adapter.n_layers)
        names = [hook_name(site, i) for site in ("z", "mlp_out") for i in layers]
        final = hook_name("resid_post", adapter.n_layers - 1)
        with adapter.recording() as recorded:
            run = adapter.run(ids, positions=slice(-1, None), read=[*names, final])
        outputs = [recorded.resid_pre[0].unsqueeze(1)]
        for layer in layers:
            mlp_out = run.cache[hook_name("mlp_out", layer)].view(*ids.shape, -1)
            outputs += [self.head_outputs(layer, run.cache[hook_name("z", layer)])]
            outputs += [mlp_out.unsqueeze(1)]
        all_outputs = torch.cat(outputs, 1)
        self.clean, self.reference = all_outputs[0], all_outputs[1:]
        self.embedded = recorded.resid_pre[0]
        streams = [*recorded.resid_pre, run.cache[final]]
        self._streams_of_reference = [stream[1:] for stream in streams]
        self._attn_out = [out[1:] for out in recorded.attn_out]
        self._final = run.cache[final]
        predicts = torch.zeros(ids.shape[1], dtype=torch.bool, device=adapter.device)
        predicts[self.predicting] = True
        self.in_class: Bool[Tensor, "class pos"] = torch.stack([~predicts, predicts])

    def head_outputs(
        self, layer: int, z: Float[Tensor, "row pos head d_head"]
    ) -> Float[Tensor, "row head pos d_model"]:
        """What every head of a layer adds to the residual stream."""
        w_o = self.adapter.weight(layer, "W_O").values.to(z)
        return torch.einsum("rphd,hdm->rhpm", z, w_o)

    def mlp_output(
        self,
        layer: int,
        resid_pre: Float[Tensor, "row pos d_model"],
        attn_out: Float[Tensor, "row pos d_model"],
    ) -> Float[Tensor, "row pos d_model"]:
        """What the MLP of a layer adds to the residual stream."""
        outputs: list[Tensor] = []

        def keep(out: Tensor) -> Tensor:
            outputs.append(out)
            return out

        with self.adapter.override_attention_output(layer, attn_out):
            edit = {hook_name("mlp_out", layer): keep}
            self.adapter.run_blocks(layer, resid_pre, layer + 1, edit=edit)
        return outputs[0].view(resid_pre.shape)

    def nll(self, final_resid: Float[Tensor, "row pos d_model"]) -> Float[Tensor, " row"]:
        """NLL of the continuation, nats/token, from what leaves the last block."""
        logits = self.adapter.unembed(final_resid[:, self.predicting])
        # At least float32, whatever the model's type.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_prob = logits.log_softmax(-1)
        targets = self.targets.expand(len(logits), -1).unsqueeze(-1)
        return -log_prob.gather(-1, targets)[..., 0].mean(-1)

    def clean_and_reference_nll(self) -> Float[Tensor, " row"]:
        """NLL on the paragraph itself, and with the input of each reference."""
        return self.nll(self._final)

    def run(self, edges: Edges) -> Float[Tensor, " reference"]:
        """NLL of the continuation with these edges only, for each reference."""
        graph, edges = self.graph, edges.to(self.adapter.device)
        # Output of every component minus that on the reference; positions first, for `_streams`.
        change = torch.zeros_like(self.reference.permute(2, 1, 0, 3).contiguous())
        change[:, 0] = (self.clean[0] - self.reference[:, 0]).transpose(0, 1)
        for layer in range(graph.n_layers):
            heads, mlp = graph.heads(layer), graph.mlp(layer)
            w_o = self.adapter.weight(layer, "W_O").values
            for nodes, stream in self._streams(edges, change, layer, [*range(*heads.indices(mlp))]):
                z = self.adapter.read_z(layer, stream)
                for node in nodes:
                    head = node // 2 - heads.start
                    self._write(change, node, z[:, :, head] @ w_o[head].to(z))
            for nodes, stream in self._streams(edges, change, layer, [mlp]):
                output = self.mlp_output(layer, stream, self._attn_out[layer])
                for node in nodes:
                    self._write(change, node, output)
        return self.nll(self._final_stream(edges, change))

    def _streams(
        self,
        edges: Edges,
        change: Float[Tensor, "pos component reference d_model"],
        layer: int,
        components: list[int],
    ) -> Iterator[tuple[list[int], Float[Tensor, "reference pos d_model"]]]:
        """Nodes that have the same edges, and what they read."""
        nodes = [2 * component + i for component in components for i in (0, 1)]
        sources, group = edges[:, nodes].unique(dim=1, return_inverse=True)
        streams = self._read(sources, change, self.graph.n_read(components[0]))
        for i, stream in enumerate(streams):
            if sources[:, i].any():
                same = [node for node, j in zip(nodes, group.tolist(), strict=True) if i == j]
                yield same, self._streams_of_reference[layer] + stream

    def _final_stream(
        self, edges: Edges, change: Float[Tensor, "pos component reference d_model"]
    ) -> Float[Tensor, "reference pos d_model"]:
        """What leaves the last block."""
        logits = self.graph.logits
        return self._streams_of_reference[-1] + self._read(edges[:, -1:], change, logits)[0]

    def _read(
        self,
        sources: Bool[Tensor, "source stream"],
        change: Float[Tensor, "pos component reference d_model"],
        n_read: int,
    ) -> Float[Tensor, "stream reference pos d_model"]:
        """Sums of the changes of some nodes among the first `n_read` components."""
        by_class = sources[: 2 * n_read].to(change.dtype).view(n_read, 2, -1)
        weights = torch.einsum("cks,kp->psc", by_class, self.in_class.to(change.dtype))
        return torch.einsum("psc,pcrm->srpm", weights, change[:, :n_read])

    def _write(
        self,
        change: Float[Tensor, "pos component reference d_model"],
        node: int,
        output: Float[Tensor, "reference pos d_model"],
    ) -> None:
        """Put the output of a node at its positions."""
        component, position_class = divmod(node, 2)
        pos = self.in_class[position_class]
        new = output[:, pos] - self.reference[:, component, pos]
        change[pos, component] = new.transpose(0, 1)
