"""llama.cpp as a benchmark's worker, through the wheel xllamacpp: its server's completion, without HTTP.

The times are those that llama.cpp reports itself: of the prompt until the first token, and of the tokens after it.
"""

import importlib
import os
import time
from typing import Any

if __package__:
    from smidgen.bench.workers.serving import peak_rss_bytes, reset_peak_rss, serve, versions
else:
    from serving import peak_rss_bytes, reset_peak_rss, serve, versions  # pyright: ignore[reportMissingImports]

__all__ = ["DecodeWorker"]


class DecodeWorker:
    """load, then run: a prompt, and so many greedy tokens after it."""

    def load(self, model: str) -> dict[str, Any]:
        llama: Any = importlib.import_module("xllamacpp")

        threads = int(os.environ["OMP_NUM_THREADS"])
        started = time.perf_counter()
        params = llama.CommonParams()
        params.model.path = model
        params.n_ctx = 2048
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.server = llama.Server(params)
        load_s = time.perf_counter() - started
        reset_peak_rss()
        return {
            "load_s": load_s,
            "settings": "the file's own blocks",
            "threads": threads,
            "instructions": llama.get_system_info(),
            "versions": versions("xllamacpp"),
        }

    def run(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        answer = self.server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        timings = answer["timings"]
        if timings["prompt_n"] != len(prompt) or timings["predicted_n"] != new_tokens:
            raise RuntimeError(f"llama.cpp computed {timings['prompt_n']} + {timings['predicted_n']} tokens")
        return {
            "prefill_s": timings["prompt_ms"] / 1000,
            "decode_s": timings["predicted_ms"] / 1000,
            "text": answer["choices"][0]["text"],
            "peak_rss_bytes": peak_rss_bytes(),
        }


if __name__ == "__main__":
    worker = DecodeWorker()
    serve({"load": worker.load, "run": worker.run})
