"""Our generation as a benchmark's worker: the token stream that `smidgen generate` reads."""

import time
from pathlib import Path
from typing import Any

import torch

from smidgen.bench.workers.serving import peak_rss_bytes, reset_peak_rss, serve, versions
from smidgen.checkpoint.open import open_checkpoint
from smidgen.model.generate import Sampling, stream_tokens
from smidgen.model.load import Source, load_base

__all__ = ["DecodeWorker"]


class DecodeWorker:
    """load, then run: a prompt, and so many greedy tokens after it."""

    def load(self, model: str) -> dict[str, Any]:
        path = Path(model)
        started = time.perf_counter()
        source = Source(model, open_checkpoint(path), tokenizer=None)
        self.base = load_base(source, quantize="auto", compute_dtype="float32", device="cpu")
        self.vocab_size = source.vocab_size
        load_s = time.perf_counter() - started
        reset_peak_rss()
        return {
            "load_s": load_s,
            "vocab_size": self.vocab_size,
            "settings": f"{self.base.storage}, float32",
            "threads": torch.get_num_threads(),
            "versions": versions("smidgen", "torch", "transformers"),
        }

    def run(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        started = time.perf_counter()
        tokens = stream_tokens(self.base, prompt, (), Sampling(max_new_tokens=new_tokens), self.vocab_size)
        said = [next(tokens)]
        prefill_s = time.perf_counter() - started
        said += list(tokens)
        decode_s = time.perf_counter() - started - prefill_s
        return {"prefill_s": prefill_s, "decode_s": decode_s, "tokens": said, "peak_rss_bytes": peak_rss_bytes()}


if __name__ == "__main__":
    worker = DecodeWorker()
    serve({"load": worker.load, "run": worker.run})
