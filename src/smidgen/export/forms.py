"""What can be written, by the names that `--to` and `--type` take. Apart from those who write it, which need torch."""

__all__ = ["EXPORTS", "EXPORT_TYPES", "PACKED_FORMS"]

PACKED_FORMS = ("nf4-dq", "nf4", "fp4", "int8", "gptq")
# What a run is exported as -> the types of its numbers, the first where nothing is asked for.
EXPORT_TYPES: dict[str, tuple[str, ...]] = {
    "gguf-lora": ("F32",),
    "gguf": ("Q8_0", "F16", "BF16", "Q4_0"),
    "ollama": ("Q8_0", "F16", "BF16", "Q4_0"),
    "hf": ("float16", "bfloat16", "float32"),
    "bnb-4bit": ("nf4-dq", "nf4", "fp4"),
}
EXPORTS = tuple(EXPORT_TYPES)
