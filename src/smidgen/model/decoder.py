"""From prompts to the next hidden state, token by token: what generation stands on.

A decoder takes prompts once (`start`), then one token for each row (`step`), and forgets rows (`keep`). There are two:
FusedDecoder for models whose layers are all fused (model/fused.py), with its own key cache and no padding; and
ModuleDecoder, which calls transformers' modules and works for everything.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from smidgen.kernels.attention import Segments, attention_decode
from smidgen.kernels.elementwise import rms_norm, swiglu
from smidgen.kernels.sizes import cache_capacity
from smidgen.model.build import Base
from smidgen.model.fused import FusedLayer, Rows, is_fused

__all__ = ["Decoder", "decoder_for"]

# Rotary tables that do not change with the length of the text.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")


class Decoder(Protocol):
    def start(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> torch.Tensor:
        """Token ids of each prompt -> last hidden state of each, [rows, hidden_size]. new_tokens: that may follow."""
        ...

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One token id for each row, int64 [rows] -> its hidden state, [rows, hidden_size]."""
        ...

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only, in this order."""
        ...


def decoder_for(base: Base) -> Decoder:
    """The fast decoder where the model is known to it, else transformers' modules."""
    if is_fused(base.backbone):
        rope = (getattr(base.model.config, "rope_parameters", None) or {}).get("rope_type", "default")
        if rope in _FIXED_ROPE:
            return FusedDecoder(base)
    return ModuleDecoder(base)


class ModuleDecoder:
    """transformers' modules and cache. Prompts are padded on the left and masked."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._cache = DynamicCache(config=base.model.config)
        self._mask = torch.empty(0)

    def start(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> torch.Tensor:
        device, longest = self._base.device, max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        self._mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        return self._forward(ids)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        return self._forward(tokens[:, None])

    def keep(self, rows: list[int]) -> None:
        kept = torch.tensor(rows, device=self._base.device)
        self._cache.batch_select_indices(kept)
        self._mask = self._mask[kept]

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        padded = bool((self._mask == 0).any())
        return self._base.backbone(
            input_ids=ids,
            attention_mask=self._mask if padded else None,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )[0][:, -1]


class FusedDecoder:
    """Layers called directly. Every row has its own length, so nothing is padded; keys and values are of the base's
    cache_dtype.

    Prompts run one after another in the compute type, steps of all rows at once in float32: with so few tokens a
    product is as fast as its weights can be unpacked, whatever the type.
    """

    def __init__(self, base: Base) -> None:
        backbone: Any = base.backbone
        self._base, self._backbone = base, backbone
        self._layers: list[FusedLayer] = list(backbone.layers)
        norms: list[list[Any]] = [[layer.input_layernorm, layer.post_attention_layernorm] for layer in self._layers]
        self._norms = [[(norm.weight.float(), norm.variance_epsilon) for norm in pair] for pair in norms]
        self._cosine = self._sine = torch.empty(0)
        self._keys: list[torch.Tensor] = []  # of each layer: [rows, kv_heads, capacity, head_dim]
        self._values: list[torch.Tensor] = []
        self._lengths = torch.empty(0, dtype=torch.int64)
        self._most = 0  # tokens that a row can ever have in the cache

    def start(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> torch.Tensor:
        self._lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(self._lengths.max())
        self._most = longest + new_tokens - 1  # nothing follows the last one
        self._reserve(longest)
        last = [self._prompt(row, prompt) for row, prompt in enumerate(prompts)]
        return self._backbone.norm(torch.stack(last))

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self._reserve(int(self._lengths.max()) + 1)
        cosine, sine = self._cosine[self._lengths], self._sine[self._lengths]
        x = self._backbone.embed_tokens(tokens).float()
        for layer, norms, keys, values in zip(self._layers, self._norms, self._keys, self._values, strict=True):
            parts = layer.parts()
            qkv = layer.project(rms_norm(x, *norms[0])[0], parts, cosine, sine)[0]
            attended = attention_decode(qkv, keys, values, self._lengths, layer.shape)
            x = x.add_(parts.out.forward(attended)[0])
            gate_up, _ = parts.gate_up.forward(rms_norm(x, *norms[1])[0])
            x = x.add_(parts.down.forward(swiglu(gate_up))[0])
        self._lengths = self._lengths + 1
        return self._backbone.norm(x.to(self._base.compute_dtype))

    def keep(self, rows: list[int]) -> None:
        self._lengths = self._lengths[rows]
        for cache in (self._keys, self._values):
            for number, kept in enumerate(cache):  # one by one, as they came
                cache[number] = kept[rows]

    def _prompt(self, row: int, prompt: Sequence[int]) -> torch.Tensor:
        """Fills a row of the cache; returns the last token's state before the final norm, [hidden_size]."""
        length, padded = len(prompt), self._base.padded(len(prompt))  # on the right, which none of them sees
        x = self._backbone.embed_tokens(torch.tensor([*prompt, *[0] * (padded - length)]))
        rows = Rows(Segments([padded]), self._cosine[:padded], self._sine[:padded])
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            shape = layer.shape
            qkv = layer.run_in_place(x, layer.parts(), rows)
            new = qkv[:length, shape.q_width :].view(length, 2, shape.kv_heads, shape.head_dim).permute(1, 2, 0, 3)
            keys[row, :, :length], values[row, :, :length] = new[0], new[1]
            del qkv, new  # before the next layer's
        return x[length - 1]

    def _reserve(self, tokens: int) -> None:
        """Room for `tokens` in every row of the cache and in the tables of positions."""
        capacity = self._keys[0].shape[2] if self._keys else 0
        if tokens <= capacity:
            return
        grown = cache_capacity(tokens, capacity, self._most)
        table = self._backbone.rotary_emb(torch.empty(0), torch.arange(self._base.padded(grown))[None])
        half = table[0].shape[-1] // 2
        self._cosine, self._sine = (part[0, :, :half].contiguous() for part in table)
        for cache in (self._keys, self._values):
            for number, layer in enumerate(self._layers):  # one by one: the old ones leave as the new ones come
                shape = (len(self._lengths), layer.shape.kv_heads, grown, layer.shape.head_dim)
                new = torch.zeros(shape, dtype=self._base.cache_dtype)
                if capacity:
                    new[:, :, :capacity] = cache[number]
                cache[number : number + 1] = [new]
