"""Which of PEFT's adapters are computed here as PEFT computes them.

A LoraConfig has fields that make another function of the same tensors, and ways to start (PiSSA, OLoRA, CorDA, LoftQ,
LoRA-GA) which take s B A off the base's weights: such an adapter belongs to the changed base, and PEFT changes the base
again when it loads one. Over the plain base their numbers would be applied wrongly in silence.
"""

from typing import Any

from smidgen.errors import RunError

__all__ = ["check_kind"]

_EXPECTED = "LoRA, rsLoRA or DoRA"
_PLAIN_STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")  # leave the base as it is
_OTHER_MATHS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


def check_kind(config: dict[str, Any], where: str) -> None:
    """Raise RunError for an adapter_config.json, at `where`, of another kind than LoRA, rsLoRA or DoRA."""
    unknown = [f"peft_type {config.get('peft_type')!r}"] if config.get("peft_type") != "LORA" else []
    unknown += ["bias"] if config.get("bias", "none") != "none" else []
    unknown += [key for key in _OTHER_MATHS if config.get(key)]
    if unknown:
        cure = "merge it with PEFT, and take the merged model"
        raise RunError(f"{where}: {', '.join(unknown)} is not supported", expected=_EXPECTED, cure=cure)
    start = config.get("init_lora_weights", True)
    if str(start).lower() not in _PLAIN_STARTS:
        raise RunError(
            f"{where}: init_lora_weights {str(start)[:40]!r} is not supported, it changes the weights of the base",
            expected=_EXPECTED,
            cure="make it plain LoRA with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), or "
            "merge it with PEFT and take the merged model",
        )
