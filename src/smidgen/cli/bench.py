"""`smidgen bench WHAT`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smidgen.bench.peers import STEP_PEERS
from smidgen.cli import bench_views
from smidgen.cli.console import Console
from smidgen.cli.options import Flag, verb
from smidgen.cli.values import Given
from smidgen.planning.estimate import RECOMPUTE
from smidgen.planning.shapes import SHAPES
from smidgen.units import parse_bytes

__all__ = ["bench"]

_WHAT = ("step", "kernels", "decode", "memory")
_FORMS = ("nf4-dq", "nf4", "int8", "gptq", "none")
_SHAPES = ("smollm2-135m", "tinyllama-1.1b")  # and 'tiny', which only tests need


def _positive(value: int) -> bool:
    return value >= 1


_MEMORY = (
    Flag("quantize", str, "nf4-dq", "How the random weights are packed.", "Memory", choices=_FORMS),
    Flag("mode", str, "train", "What is done.", "Memory", choices=("train", "generate")),
    Flag("new_tokens", int, 8, "Tokens generated after the row.", "Memory", check=_positive, expected="1 or more"),
    Flag("micro_batch", int, 1, "Rows at once.", "Memory", check=_positive, expected="1 or more"),
    Flag("layers", int, None, "Cut the model to so many layers.", "Memory", check=_positive, expected="1 or more"),
    Flag(
        "memory", str, None, "Limit, enforced by a cgroup where one can be made: 2GiB, 1.5GB.", "Memory", metavar="SIZE"
    ),
    Flag("rank", int, 8, "Rank of the adapters.", "Memory", check=_positive, expected="1 or more"),
    Flag("targets", str, "q,v", "Layers that get one, as in finetune.", "Memory"),
    Flag(
        "activation_dtype",
        str,
        "auto",
        "What is kept for the backward pass waits in this type.",
        "Memory",
        choices=("auto", "bfloat16"),
    ),
    Flag("resident", bool, False, "Also measure the same with every layer in memory.", "Memory"),
)
_COMMON = (
    Flag(
        "repeats",
        int,
        None,
        "Rounds, after one that does not count: 7, of memory 1. 0, of memory: the first one counts.",
        "General",
        check=lambda value: value >= 0,
        expected="0 or more",
    ),
    Flag(
        "isa",
        str,
        None,
        "Keep all sides to an older instruction set than the machine has.",
        "General",
        choices=("avx2",),
    ),
)
_STEP = (
    Flag(
        "shape",
        str,
        _SHAPES[0],
        "Sizes of the model; its weights are random. memory: any that `smidgen plan` knows.",
        "Step",
        metavar="[" + "|".join(_SHAPES) + "]",
        check=lambda value: value in SHAPES,
        expected="a shape that `smidgen plan` knows",
    ),
    Flag("seq_len", int, 512, "Tokens of the one row.", "Step", check=lambda value: value >= 2, expected="2 or more"),
    Flag("recompute", str, "none", "What the backward pass computes again.", "Step", choices=RECOMPUTE),
    Flag("compute_dtype", str, "float32", "Our compute type.", "Step", choices=("float32", "bfloat16")),
    Flag(
        "against",
        str,
        None,
        f"Other tools, comma list of {', '.join(STEP_PEERS)}. What is not installed is put into the cache first.",
        "Step",
        metavar="LIST",
    ),
    Flag("against_checkpointing", bool, False, "The same as peft-bnb-ckpt at the end of --against.", "Step"),
    Flag("four_bit_tax", bool, True, "Also step over a dense float32 base.", "Step"),
    Flag("keep", str, None, "Keep the random weights here, for the next time.", "Step", metavar="DIR"),
)


def _against(given: Given) -> tuple[str, ...]:
    names = [name.strip() for name in (given["against"] or "").split(",") if name.strip()]
    return tuple(dict.fromkeys([*names, *(["peft-bnb-ckpt"] if given["against_checkpointing"] else [])]))


_TRAINS, _GENERATES = ("recompute", "rank", "targets", "activation_dtype", "micro_batch"), ("new_tokens",)


def _check_memory(given: Given) -> list[str]:
    other, ignored = ("train", _TRAINS) if given["mode"] == "generate" else ("generate", _GENERATES)
    problems = given.misplaced(ignored, f"--mode {other}")
    shape = SHAPES.get(given["shape"])
    if shape and given["layers"] and given["layers"] > shape["num_hidden_layers"]:
        problems.append(f"layers: expected at most the shape's {shape['num_hidden_layers']}, found {given['layers']}")
    return problems


def _check(given: Given) -> list[str]:
    what = given["what"]
    problems = []
    if what is not None and what not in _WHAT:
        problems.append(f"what: expected one of {', '.join(_WHAT)}, found {what!r}")
    else:
        shared = {"memory": ("shape", "seq_len", "recompute", "compute_dtype", "keep")}.get(what or "", ())
        if what != "step":
            others = [flag.name for flag in _STEP if flag.name not in shared]
            problems += given.misplaced(others, "`smidgen bench step`")
        elif given["shape"] not in {*_SHAPES, "tiny"}:
            problems.append(f"shape: expected one of {', '.join(_SHAPES)}, found {given['shape']!r}")
        if what != "memory":
            problems += given.misplaced([flag.name for flag in _MEMORY], "`smidgen bench memory`")
    if what == "memory":
        problems += _check_memory(given)
    if given["repeats"] == 0 and what != "memory":
        problems.append("repeats: expected 1 or more, found 0")
    if given["memory"] is not None:
        try:
            if not parse_bytes(given["memory"]):
                problems.append(f"memory: expected more than 0, found {given['memory']!r}")
        except ValueError as error:
            problems.append(f"memory: {error}")
    unknown = [name for name in _against(given) if name not in STEP_PEERS]
    if unknown:
        problems.append(f"against: expected names out of {', '.join(STEP_PEERS)}, found {', '.join(unknown)}")
    return problems


@verb("bench", arguments=("what",), flags=(*_STEP, *_MEMORY, *_COMMON), check=_check)
def bench(console: Console, given: Given) -> Mapping[str, Any]:
    """Measure this machine: a training step, the kernels, or generation, next to other tools.

    WHAT is step (one optimizer step with LoRA on all linear layers), kernels (de-quantise, quantise, multiply), decode
    (prompt and generation of smollm2-135m) or memory (steps of any shape within a limit, beside their forecast). Sides
    run in processes of their own, in turn, so that a machine whose speed drifts is fair to all. Nothing else should run
    meanwhile.

    \b
    Examples:
      smidgen bench step --shape smollm2-135m --against peft-bnb
      smidgen bench step --shape tinyllama-1.1b --recompute cheap --against-checkpointing --json
      smidgen bench kernels
      smidgen bench memory --shape llama-7b --memory 2GiB --recompute full
    """
    repeats = given["repeats"] if given["repeats"] is not None else 1 if given["what"] == "memory" else 7
    if given["what"] == "step":
        from smidgen.bench.step import StepSettings, bench_step

        settings = StepSettings(
            shape=given["shape"],
            seq_len=given["seq_len"],
            recompute=given["recompute"],
            compute_dtype=given["compute_dtype"],
            repeats=repeats,
            against=_against(given),
            four_bit_tax=given["four_bit_tax"],
            isa=given["isa"] or "",
            keep=Path(given["keep"]) if given["keep"] else None,
        )
        result = bench_step(settings, console.report)
        parts = bench_views.step(result)
    elif given["what"] == "kernels":
        from smidgen.bench.kernels import KernelSettings, bench_kernels

        result = bench_kernels(KernelSettings(repeats=repeats, isa=given["isa"] or ""), console.report)
        parts = bench_views.kernels(result)
    elif given["what"] == "memory":
        from smidgen.bench.memory import MemorySettings, bench_memory

        names = ("shape", "quantize", "mode", "seq_len", "new_tokens", "micro_batch", "layers", "rank", "targets")
        memory = MemorySettings(
            **{name: given[name] for name in (*names, "compute_dtype", "activation_dtype")},
            resident=given["resident"],
            recompute=given["recompute"] if "recompute" in given.named else "auto",
            memory=None if given["memory"] is None else parse_bytes(given["memory"]),
            repeats=repeats,
            isa=given["isa"] or "",
            keep=Path(given["keep"]) if given["keep"] else None,
        )
        result = bench_memory(memory, console.report)
        parts = bench_views.memory(result)
    else:
        from smidgen.bench.decode import DecodeSettings, bench_decode

        result = bench_decode(DecodeSettings(repeats=repeats, isa=given["isa"] or ""), console.report)
        parts = bench_views.decode(result)
    console.close()
    for title, table in parts:
        console.title(title)
        console.show(table)
    console.line()
    console.line(bench_views.where(result))
    return result
