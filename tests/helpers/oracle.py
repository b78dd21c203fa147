"""The same numbers from transformers and PyTorch alone: no TransformerLens, none of our own code.

Where the two must agree, a mistake in either shows. Weights are found by the names that
transformers gives them, heads are cut out of them by hand, interventions are forward pre-hooks on
the output projection (whose input is every head's z side by side), gradients are plain autograd,
recitation is `generate`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# architecture -> (blocks, output projection within a block)
_PLACES = {
    "gpt_neo": ("transformer.h", "attn.attention.out_proj"),
    "gpt2": ("transformer.h", "attn.c_proj"),
    "neox": ("gpt_neox.layers", "attention.dense"),
    "opt": ("model.decoder.layers", "self_attn.out_proj"),
    "llama": ("model.layers", "self_attn.o_proj"),
    "qwen3": ("model.layers", "self_attn.o_proj"),
    "gemma2": ("model.layers", "self_attn.o_proj"),
}
_LLAMA_MLP = {"W_gate": "mlp.gate_proj", "W_in": "mlp.up_proj", "W_out": "mlp.down_proj"}
MLPS = {
    "gpt_neo": {"W_in": "mlp.c_fc", "W_out": "mlp.c_proj"},
    "gpt2": {"W_in": "mlp.c_fc", "W_out": "mlp.c_proj"},
    "neox": {"W_in": "mlp.dense_h_to_4h", "W_out": "mlp.dense_4h_to_h"},
    "opt": {"W_in": "fc1", "W_out": "fc2"},
    "llama": _LLAMA_MLP,
    "qwen3": _LLAMA_MLP,
    "gemma2": _LLAMA_MLP,
}


class Plain:
    """A transformers model with its heads found by hand."""

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model, config = name, model, model.config
        self.n_heads: int = config.num_attention_heads
        self.n_kv_heads: int = getattr(config, "num_key_value_heads", None) or self.n_heads
        blocks, out = _PLACES[name]
        self.blocks = list(model.get_submodule(blocks))
        self.out = [block.get_submodule(out) for block in self.blocks]
        self.n_layers = len(self.blocks)

    # -- forward passes -------------------------------------------------------------------------

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits

    def attention(self, ids: Tensor) -> Tensor:
        """[row, layer, head, query, key]."""
        with torch.no_grad():
            result = self.model(input_ids=ids, use_cache=False, output_attentions=True)
        return torch.stack(result.attentions, 1)

    def em(self, ids: Tensor, n_prefix: int) -> Tensor:
        """Tokens decoded greedily by `generate` that match before the first mismatch."""
        n_new = ids.shape[1] - n_prefix
        with torch.no_grad():
            decoded = self.model.generate(
                ids[:, :n_prefix],
                attention_mask=torch.ones_like(ids[:, :n_prefix]),
                do_sample=False,
                min_new_tokens=n_new,
                max_new_tokens=n_new,
                eos_token_id=None,
                pad_token_id=0,
            )
        matches = (decoded[:, n_prefix:] == ids[:, n_prefix:]).long()
        return matches.cumprod(1).sum(1)

    def log_prob(self, ids: Tensor, n_prefix: int) -> Tensor:
        """Log-probability of each continuation token, [batch, pos]."""
        log_prob = self.logits(ids).float().log_softmax(-1)[:, n_prefix - 1 : -1]
        return log_prob.gather(-1, ids[:, n_prefix:, None])[..., 0]

    def nll(self, ids: Tensor, n_prefix: int) -> Tensor:
        return -self.log_prob(ids, n_prefix).mean(-1)

    # -- heads ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def head_input(self, layer: int, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Show z [batch, pos, head, d_head] of a layer to `change`, which may replace it."""

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            result = change(args[0].unflatten(-1, (self.n_heads, -1)))
            return None if result is None else (result.flatten(-2), *args[1:])

        handle = self.out[layer].register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def without(
        self,
        heads: Iterable[tuple[int, int]] = (),
        mlps: Iterable[int] = (),
        neurons: Iterable[tuple[int, int]] = (),
    ) -> Iterator[None]:
        """Heads (layer, head), MLPs and neurons (layer, neuron) give zeros."""

        def no_head(head: int) -> Callable[[Tensor], Tensor]:
            def change(z: Tensor) -> Tensor:
                z = z.clone()
                z[:, :, head] = 0
                return z

            return change

        def no_neuron(neuron: int) -> Callable[..., tuple[Tensor, ...]]:
            def change(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                post = args[0].clone()
                post[..., neuron] = 0
                return (post, *args[1:])

            return change

        with contextlib.ExitStack() as stack:
            for layer, head in heads:
                stack.enter_context(self.head_input(layer, no_head(head)))
            for layer in mlps:
                hook = self._w_out(layer).register_forward_hook(lambda _, args, out: 0 * out)
                stack.callback(hook.remove)
            for layer, neuron in neurons:
                hook = self._w_out(layer).register_forward_pre_hook(no_neuron(neuron))
                stack.callback(hook.remove)
            yield

    def _w_out(self, layer: int) -> nn.Module:
        return self.blocks[layer].get_submodule(MLPS[self.name]["W_out"])

    def z(self, ids: Tensor) -> list[Tensor]:
        """z of every layer, [batch, pos, head, d_head]."""
        kept: list[Tensor] = []
        with contextlib.ExitStack() as stack, torch.no_grad():
            for layer in range(self.n_layers):
                stack.enter_context(self.head_input(layer, lambda z: kept.append(z.clone())))
            self.logits(ids)
        return kept

    def z_gradients(self, ids: Tensor, n_prefix: int) -> list[Tensor]:
        """Gradient of the mean NLL for z of every layer, [batch, pos, head, d_head]."""
        kept: list[Tensor] = []

        def keep(z: Tensor) -> Tensor:
            kept.append(z.detach().requires_grad_() if not kept else z + 0)
            return kept[-1]

        with contextlib.ExitStack() as stack:
            for layer in range(self.n_layers):
                stack.enter_context(self.head_input(layer, keep))
            loss = self.nll(ids, n_prefix).mean()
        return list(torch.autograd.grad(loss, kept))

    def nll_with_z(self, ids: Tensor, n_prefix: int, new: list[Tensor]) -> Tensor:
        """NLL after replacing each head's z in turn by `new`, [row, layer, head]."""
        result = torch.empty(len(ids), self.n_layers, self.n_heads)
        for layer in range(self.n_layers):
            for head in range(self.n_heads):

                def change(z: Tensor, layer: int = layer, head: int = head) -> Tensor:
                    z = z.clone()
                    z[:, :, head] = new[layer][..., : z.shape[1], head, :]
                    return z

                with self.head_input(layer, change), torch.no_grad():
                    result[:, layer, head] = self.nll(ids, n_prefix)
        return result

    # -- weights --------------------------------------------------------------------------------

    def weights(self, of: Callable[[nn.Parameter], Tensor]) -> dict[str, list[Tensor]]:
        """component -> per layer [head, d_in, d_out] of the parameters' values or gradients."""
        values: dict[str, list[Tensor]] = {}
        for block, out in zip(self.blocks, self.out, strict=True):
            for component, matrix in self._attention(block, of).items():
                values.setdefault(component, []).append(matrix)
            values.setdefault("W_O", []).append(
                _in_out(out, of).unflatten(0, (self.n_heads, -1))  # [head, d_head, d_model]
            )
            for component, place in MLPS[self.name].items():
                matrix = _in_out(block.get_submodule(place), of)
                values.setdefault(component, []).append(matrix[None])
        return values

    def _attention(self, block: Any, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        if self.name == "gpt2":  # q, k and v side by side
            parts = _in_out(block.attn.c_attn, of).chunk(3, 1)
        elif self.name == "neox":  # per head q, k and v
            fused = _in_out(block.attention.query_key_value, of)
            parts = fused.unflatten(1, (self.n_heads, 3, -1)).unbind(2)
            return {c: p.transpose(0, 1) for c, p in zip(("W_Q", "W_K", "W_V"), parts, strict=True)}
        else:
            owner = block.attn.attention if self.name == "gpt_neo" else block.self_attn
            parts = [_in_out(getattr(owner, f"{x}_proj"), of) for x in "qkv"]
        heads = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        return {
            c: p.unflatten(1, (n, -1)).transpose(0, 1)
            for c, p, n in zip(("W_Q", "W_K", "W_V"), parts, heads, strict=True)
        }

    def gradients(self, ids: Tensor, n_prefix: int) -> dict[str, list[Tensor]]:
        """Gradient of the mean NLL, per component and layer [head, d_in, d_out]."""
        self.model.requires_grad_(True)
        parameters = list(self.model.parameters())
        loss = self.nll(ids, n_prefix).mean()
        result = torch.autograd.grad(loss, parameters, allow_unused=True)
        by_id = {id(p): g for p, g in zip(parameters, result, strict=True)}
        return self.weights(lambda parameter: by_id[id(parameter)])


def _in_out(module: nn.Module, of: Callable[[nn.Parameter], Tensor]) -> Tensor:
    """A weight as [d_in, d_out]: transformers' Conv1D stores it so, torch's Linear transposed."""
    weight = of(module.weight)
    return weight.T if isinstance(module, nn.Linear) else weight
