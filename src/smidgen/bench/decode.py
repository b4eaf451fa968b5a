"""`smidgen bench decode`: a prompt and the tokens after it on one GGUF file, ours, llama.cpp's and transformers'."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smidgen.bench.controller import Worker, start_worker
from smidgen.bench.figures import paired_ratio, spread
from smidgen.bench.machine import describe
from smidgen.bench.peers import peer_interpreter
from smidgen.checkpoint.hub import resolve_model
from smidgen.errors import RunError
from smidgen.events import Note, Progress, Report, Warned, silent

__all__ = ["DecodeSettings", "bench_decode"]

_PEERS = {"llama.cpp": ("decode_llamacpp", "xllamacpp"), "transformers": ("decode_transformers", "transformers")}


@dataclass(frozen=True)
class DecodeSettings:
    """model: a .gguf file or a built-in name."""

    model: str = "smollm2-135m"
    prompt_tokens: int = 512
    new_tokens: int = 128
    repeats: int = 7
    isa: str = ""


def bench_decode(settings: DecodeSettings, report: Report = silent) -> dict[str, Any]:
    """The same random token ids for all sides; one unreported run each, then `repeats` rounds."""
    model, threads = resolve_model(settings.model, report), torch.get_num_threads()
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        ours = stack.enter_context(start_worker("smidgen", "decode_smidgen", threads=threads, isa=settings.isa))
        loaded = {"smidgen": ours.ask("load", model=str(model))}
        workers: dict[str, Worker] = {"smidgen": ours}
        for name, (program, package) in _PEERS.items():
            try:
                interpreter = peer_interpreter(package, (package,), report)
                report(Note(f"{name}: loading {model.name}"))
                worker = stack.enter_context(
                    start_worker(name, program, interpreter=interpreter, threads=threads, isa=settings.isa)
                )
                loaded[name] = worker.ask("load", model=str(model))
                workers[name] = worker
            except RunError as error:
                skipped[name] = str(error)
                report(Warned(f"{name} is skipped: {error}"))
        runs = _measure(workers, settings, loaded["smidgen"]["vocab_size"], report)
    return _result(settings, model, threads, loaded, runs, skipped)


def _measure(
    workers: dict[str, Worker], settings: DecodeSettings, vocab_size: int, report: Report
) -> dict[str, list[dict[str, Any]]]:
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(vocab_size, (settings.prompt_tokens,), generator=generator).tolist()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    what, total = f"generation of {', '.join(workers)}", (settings.repeats + 1) * len(workers)
    for number in range(settings.repeats + 1):
        for place, (name, worker) in enumerate(workers.items()):
            report(Progress(what, number * len(workers) + place, total))
            run = worker.ask("run", prompt=prompt, new_tokens=settings.new_tokens)
            if number:
                runs[name].append(run)
    report(Progress(what, total, total))
    return runs


def _result(
    settings: DecodeSettings,
    model: Path,
    threads: int,
    loaded: dict[str, dict[str, Any]],
    runs: dict[str, list[dict[str, Any]]],
    skipped: dict[str, str],
) -> dict[str, Any]:
    figures = {name: _figures(settings, runs[name]) for name in runs}
    ours = figures["smidgen"]
    peers = [
        {
            "name": name,
            "settings": loaded[name]["settings"],
            **figures[name],
            # Rates: ours / theirs of the same round.
            "prefill_speedup": paired_ratio(ours["prefill"], figures[name]["prefill"]),
            "decode_speedup": paired_ratio(ours["decode"], figures[name]["decode"]),
        }
        for name in runs
        if name != "smidgen"
    ]
    return {
        "model": model.name,
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "repeats_wanted": settings.repeats,
        "settings": loaded["smidgen"]["settings"],
        **ours,
        "peers": peers,
        "skipped": skipped,
        **describe(settings.isa, threads, {k: v for each in loaded.values() for k, v in each["versions"].items()}),
    }


def _figures(settings: DecodeSettings, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens a second. The first new token is the prefill's, so decoding is the time of all tokens but that one."""
    prefill = [settings.prompt_tokens / run["prefill_s"] for run in runs]
    decode = [(settings.new_tokens - 1) / run["decode_s"] for run in runs]
    return {
        **spread(prefill, "prefill_tokens_per_s"),
        **spread(decode, "decode_tokens_per_s"),
        "prefill": prefill,
        "decode": decode,
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
    }
