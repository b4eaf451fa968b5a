"""SFTTrainer of TRL over PEFT + bitsandbytes NF4, one run: `python sft_trl.py JOB.json`; it ends with a JSON object.

JOB.json: folder (of the base), rows (chat rows), held_out (rows as token ids and labels), settings, and adapters:
"float32" is cast back by hand, its best on a CPU; "as shipped" is bfloat16, which TRL forces on 4-bit models.
"""

import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
import trl


def peak_rss_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@torch.inference_mode()
def held_out_loss(model: Any, rows: list[dict[str, list[int]]]) -> tuple[float, int]:
    """(mean over labelled tokens of their negative log-likelihood, how many there are)."""
    model.eval()
    total, count = 0.0, 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].float()
        labels = torch.tensor(row["labels"][1:])
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count, count


def main(job: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    settings = job["settings"]
    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=torch.float32, attn_implementation="sdpa", quantization_config=quantised
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["folder"])
    rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in job["rows"]]
    with tempfile.TemporaryDirectory() as out:
        config = trl.SFTConfig(
            output_dir=out,
            per_device_train_batch_size=settings["micro_batch"],
            num_train_epochs=1,
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=settings["warmup_steps"],
            max_length=1024,
            completion_only_loss=True,
            packing=False,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            report_to="none",
            save_strategy="no",
            logging_steps=25,
            disable_tqdm=True,
            seed=settings["seed"],
        )
        lora = peft.LoraConfig(
            r=settings["rank"], lora_alpha=settings["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora,
        )
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        if job["adapters"] == "float32":
            for parameter in trained:
                parameter.data = parameter.data.float()
        tokenised = trainer.train_dataset
        tokens = sum(len(row["input_ids"]) for row in tokenised)
        before_s = time.perf_counter() - started
        train_started = time.perf_counter()
        done = trainer.train()
        train_s = time.perf_counter() - train_started
        peak = peak_rss_bytes()
        loss, labelled = held_out_loss(trainer.model, job["held_out"])
    return {
        "adapters": str(trained[0].dtype).removeprefix("torch."),
        "train_s": train_s,
        "before_s": before_s,
        "wall_s": time.perf_counter() - started,
        "steps": done.global_step,
        "tokens": tokens,
        "tokens_per_s": tokens / train_s,
        "peak_rss_bytes": peak,
        "loss_after": loss,
        "held_out_tokens": labelled,
        "trainable_parameters": sum(parameter.numel() for parameter in trained),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "trl")},
    }


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    print(json.dumps(result))
