"""Rotary scaling of GGUF metadata as config.json's rope_parameters, with the defaults of llama.cpp.

    <architecture>.rope.freq_base                          theta
    .rope.scaling.type                                     none, linear (also without the key), yarn, longrope
    .rope.scaling.factor, formerly .rope.scale_linear      by which positions are divided; 0 and no key: 1
    .rope.scaling.attn_factor                              cosines and sines times this, beside what the type does
    .rope.scaling.original_context_length                  YaRN and longrope: before the context was made longer
    .rope.scaling.yarn_beta_fast, yarn_beta_slow           YaRN: rotations between which frequencies are blended
    .rope.scaling.yarn_log_multiplier                      YaRN: transformers' mscale_all_dim, beside an mscale of 1
    .rope.scaling.yarn_attn_factor                         YaRN: transformers' attention_factor, in place of all that
    .rope.scaling.yarn_ext_factor                          YaRN: how much of it; transformers has 1 alone

Llama 3's scaling and longrope's factors are tensors of the file: gguf.py adds them, and longrope's attn_factor.
"""

import math
from typing import Any

from smidgen.errors import ModelError

from .gguf_header import GgufHeader, Metadata

__all__ = ["rope_parameters", "yarn_magnitude"]


def rope_parameters(header: GgufHeader, name: str, config: dict[str, Any]) -> dict[str, Any]:
    """name: the architecture. Raises ModelError for a scaling that transformers cannot compute."""
    metadata, key = header.metadata, f"{name}.rope.scaling."
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.number(f"{name}.rope.freq_base", 10_000.0)}
    kind, factor = metadata.text(f"{key}type", "linear"), _factor(metadata, name)
    if kind == "yarn":
        return rope | _yarn(metadata, name, config, factor)
    has_tables = "rope_factors_long.weight" in header.tensors
    if kind not in ("none", "linear") and not (kind == "longrope" and has_tables):
        expected = "none, linear or yarn"
        raise ModelError(f"{metadata.path}: unknown rotary scaling", expected=expected, found=kind[:40])
    is_linear = kind == "linear" and factor != 1
    magnitude = metadata.number(f"{key}attn_factor", None)
    if (is_linear and has_tables) or (magnitude not in (None, 1) and not has_tables):
        beside = "rope_factors_long.weight" if has_tables else f"{key}attn_factor = {magnitude:g}"
        raise ModelError(
            f"{metadata.path}: {beside} beside a rotary scaling of type {kind} by {factor:g}, which transformers"
            " cannot compute", cure="use the model's Hugging Face folder instead",
        )  # fmt: skip
    return rope | ({"rope_type": "linear", "factor": factor} if is_linear else {})


def _factor(metadata: Metadata, name: str) -> float:
    keys = [key for key in (f"{name}.rope.scaling.factor", f"{name}.rope.scale_linear") if key in metadata.values]
    return _number(metadata, keys[0], 1.0) if keys else 1.0


def _number(metadata: Metadata, key: str, default: float) -> float:
    """As Metadata.number; 0 stands for no number."""
    return float(metadata.number(key, default)) if metadata.values.get(key) else default


def _yarn(metadata: Metadata, name: str, config: dict[str, Any], factor: float) -> dict[str, Any]:
    key = f"{name}.rope.scaling."
    share = metadata.values.get(f"{key}yarn_ext_factor", 1)
    if share not in (1, -1):  # -1: not said
        raise ModelError(
            f"{metadata.path}: {key}yarn_ext_factor", expected="1, as transformers has it", found=f"{share}"
        )
    original = metadata.integer(f"{key}original_context_length", config["max_position_embeddings"], low=1)
    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for beta in ("beta_fast", "beta_slow"):
        if f"{key}yarn_{beta}" in metadata.values:
            rope[beta] = float(metadata.number(f"{key}yarn_{beta}"))
    usual = yarn_magnitude(factor)
    magnitude = usual / yarn_magnitude(factor, _number(metadata, f"{key}yarn_log_multiplier", 0.0))
    magnitude *= float(metadata.number(f"{key}attn_factor", 1.0))
    magnitude = float(metadata.number(f"{key}yarn_attn_factor", magnitude))
    return rope if math.isclose(magnitude, usual, rel_tol=1e-6) else rope | {"attention_factor": magnitude}


def yarn_magnitude(factor: float, share: float = 1.0) -> float:
    """What YaRN multiplies cosines and sines by (arXiv 2309.00071, section 3.4)."""
    return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0
