"""transformers' generation in float32 as a benchmark's worker: the model's own forward with its cache, greedily.

The loop is written out, which is faster than `generate()` and measures the model alone. Only the last position's logits
are computed.
"""

import time
from typing import Any

import torch

if __package__:
    from smidgen.bench.workers.serving import peak_rss_bytes, reset_peak_rss, serve, versions
else:
    from serving import peak_rss_bytes, reset_peak_rss, serve, versions  # pyright: ignore[reportMissingImports]

__all__ = ["DecodeWorker"]


class DecodeWorker:
    """load, then run: a prompt, and so many greedy tokens after it."""

    def load(self, model: str) -> dict[str, Any]:
        import os

        import transformers

        started = time.perf_counter()
        folder, name = os.path.split(model)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        load_s = time.perf_counter() - started
        reset_peak_rss()
        return {
            "load_s": load_s,
            "settings": "float32, sdpa",
            "threads": torch.get_num_threads(),
            "versions": versions("torch", "transformers"),
        }

    @torch.inference_mode()
    def run(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        said: list[int] = []
        cache, step, prefill_s = None, torch.tensor([prompt]), 0.0
        started = time.perf_counter()
        while len(said) < new_tokens:
            output = self.model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, step = output.past_key_values, output.logits[:, -1].argmax(dim=-1)[:, None]
            said.append(int(step))
            prefill_s = prefill_s or time.perf_counter() - started
        decode_s = time.perf_counter() - started - prefill_s
        return {"prefill_s": prefill_s, "decode_s": decode_s, "tokens": said, "peak_rss_bytes": peak_rss_bytes()}


if __name__ == "__main__":
    worker = DecodeWorker()
    serve({"load": worker.load, "run": worker.run})
