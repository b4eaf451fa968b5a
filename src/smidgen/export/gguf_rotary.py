"""A model's rotary embedding as GGUF metadata and tensors. checkpoint/gguf_rotary.py reads them; it has the keys."""

import math
from typing import Any

import numpy as np
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from smidgen.checkpoint.gguf import GgufCheckpoint
from smidgen.checkpoint.gguf_rotary import yarn_magnitude
from smidgen.errors import RunError
from smidgen.events import Report, Warned
from smidgen.model.build import Base

__all__ = ["rotary_factors", "rotary_metadata"]

_CPU = torch.device("cpu")
_BETAS = {"beta_fast": 32, "beta_slow": 1}


def rotary_metadata(name: str, config: Any, head_dim: int, report: Report) -> dict[str, Any]:
    """name: the architecture in GGUF. Raises RunError for what GGUF has no place for."""
    rope, layers = dict(config.rope_parameters), None
    values: dict[str, Any] = {}
    if "full_attention" in rope:  # Gemma 3
        layers, local = "full_attention", dict(rope["sliding_attention"])
        if local.get("rope_type", "default") != "default":
            raise _no_place(f"{local['rope_type']} of the layers with a window")
        values[f"{name}.rope.freq_base_swa"] = float(local["rope_theta"])
        rope = dict(rope[layers])
    values[f"{name}.rope.freq_base"] = float(rope["rope_theta"])
    values[f"{name}.rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    kind, key = rope.get("rope_type", "default"), f"{name}.rope.scaling."
    if kind not in ("default", "linear", "yarn", "llama3") and not (kind == "longrope" and name == "phi3"):
        raise _no_place(kind)
    if kind == "linear":
        values |= {f"{key}type": kind, f"{key}factor": float(rope["factor"])}
    if kind in ("yarn", "longrope"):
        original = int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        _, magnitude = ROPE_INIT_FUNCTIONS[kind](config, _CPU, layer_type=layers)
        values[f"{key}original_context_length"] = original
        if kind == "yarn":
            values |= _yarn(key, rope, rope["factor"] or config.max_position_embeddings / original, magnitude, report)
        else:
            values[f"{key}attn_factor"] = float(magnitude)
    return values


def _yarn(key: str, rope: dict[str, Any], factor: float, magnitude: float, report: Report) -> dict[str, Any]:
    """magnitude: what the model multiplies cosines and sines by. llama.cpp knows of it by attn_factor alone."""
    if not rope.get("truncate", True):
        raise _no_place("yarn with truncate = false")
    values: dict[str, Any] = {f"{key}type": "yarn", f"{key}factor": float(factor)}
    beyond = magnitude / yarn_magnitude(factor)
    if not math.isclose(beyond, 1, rel_tol=1e-6):
        values[f"{key}attn_factor"] = beyond
    betas = {name: rope[name] for name, usual in _BETAS.items() if (rope.get(name) or usual) != usual}
    if betas:
        report(Warned(f"YaRN's {', '.join(betas)}: llama.cpp has 32 and 1 for this model, whatever the file says"))
    return values | {f"{key}yarn_{name}": float(beta) for name, beta in betas.items()}


def _no_place(kind: str) -> RunError:
    return RunError(f"rotary scaling {kind!r} is not written as GGUF here", cure="use --to hf")


def rotary_factors(base: Base) -> dict[str, np.ndarray]:
    """Tensors that are no parameter: what divides each frequency (Llama 3), or does so in short and in long texts."""
    checkpoint = base.checkpoint
    if isinstance(checkpoint, GgufCheckpoint):
        names = [name for name in checkpoint.row.ignored if name in checkpoint.header.tensors]
        return {name: checkpoint.extra(name).numpy() for name in names}
    config: Any = base.model.config
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{k}.weight": np.array(rope[f"{k}_factor"], np.float32) for k in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    backbone: Any = base.backbone
    return {"rope_freqs.weight": (plain / backbone.rotary_emb.inv_freq.double().cpu()).float().numpy()}
