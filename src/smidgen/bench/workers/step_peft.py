"""The peer's training step as a benchmark's worker: transformers + PEFT, with or without bitsandbytes.

Runs by its path under an interpreter that needs no smidgen. The step is the plain loop that PEFT's own examples have:
forward with labels, backward, clip, AdamW; its optimizer is the fused one, as ours is.
"""

import time
from typing import Any

import torch

if __package__:
    from smidgen.bench.workers.bitsandbytes_isa import kept_to_isa
    from smidgen.bench.workers.serving import peak_rss_bytes, reset_peak_rss, serve, timed_step, versions
else:
    from bitsandbytes_isa import kept_to_isa  # pyright: ignore[reportMissingImports]
    from serving import peak_rss_bytes, reset_peak_rss, serve, timed_step, versions  # pyright: ignore[reportMissingImports]

__all__ = ["StepWorker"]


class StepWorker:
    """load, then step as often as wanted."""

    def load(
        self,
        folder: str,
        input_ids: list[int],
        quantized: bool,
        compute_dtype: str,
        checkpointing: bool,
        rank: int,
        alpha: float,
        learning_rate: float,
        probe_width: int,
    ) -> dict[str, Any]:
        kept = kept_to_isa()  # before anything imports bitsandbytes
        import peft
        import transformers

        dtype = getattr(torch, compute_dtype)
        settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
        if quantized:
            import bitsandbytes  # noqa: F401  (its import is no part of loading)

            settings["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        reset_peak_rss()
        started = time.perf_counter()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)
        load_s, load_peak = time.perf_counter() - started, peak_rss_bytes()
        model.config.use_cache = False
        # Freezes the base and, at bfloat16, turns what is not quantised to float32: the way of PEFT's guides.
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=rank, lora_alpha=int(alpha), target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = peft.get_peft_model(model, lora)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0, fused=True)
        self.input_ids = torch.tensor([input_ids])
        self.probe_width = probe_width
        return {
            "kept_to_isa": kept,
            "load_s": load_s,
            "load_peak_rss_bytes": load_peak,
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "trainable_parameters": sum(parameter.numel() for parameter in self.parameters),
            "versions": versions("torch", "transformers", "peft", "bitsandbytes"),
        }

    def step(self) -> dict[str, Any]:
        return timed_step(self._step, self.probe_width)

    def _step(self) -> float:
        self.model.train()
        loss = self.model(input_ids=self.input_ids, labels=self.input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


if __name__ == "__main__":
    worker = StepWorker()
    serve({"load": worker.load, "step": worker.step})
