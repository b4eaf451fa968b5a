"""`smidgen bench` as a user sees it, over stand-ins for the measurements."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from smidgen.bench import decode, kernels, step
from smidgen.bench.peers import STEP_PEERS
from smidgen.bench.shapes import SHAPES
from smidgen.cli import bench as command
from smidgen.cli.main import main

MACHINE = {"machine": {"processor": "A processor", "threads": 2, "isa": "avx2"}, "skipped": {}, "repeats_wanted": 7}
SIDE = {
    "step_s": 4.0, "step_s_min": 3.9, "step_s_max": 4.5, "roofline_fraction": 0.8, "peak_rss_bytes": 1_500_000_000,
    "load_s": 2.0, "load_peak_rss_bytes": 900_000_000, "loss": [10.9, 10.8],
}  # fmt: skip
STEP = {
    **SIDE, "dense": SIDE, "four_bit_tax": 1.03, "peers": [{**SIDE, "name": "peft-bnb", "speedup": 1.5}],
    "shape": "smollm2-135m", "seq_len": 512, "recompute": "none", "notes": ["a note"], **MACHINE,
}  # fmt: skip
RATES = {
    f"{name}{end}": 9.5 for name in ("prefill_tokens_per_s", "decode_tokens_per_s") for end in ("", "_min", "_max")
}
DECODE = {
    **RATES, "model": "m.gguf", "prompt_tokens": 512, "new_tokens": 128, "settings": "nf4-dq", "peak_rss_bytes": 1,
    "peers": [{**RATES, "name": "llama.cpp", "settings": "", "peak_rss_bytes": 1, "prefill_speedup": 2.5,
               "decode_speedup": 0.8}], **MACHINE,
}  # fmt: skip
TIMES = {"seconds": 2e-3, "seconds_min": 1e-3, "seconds_max": 3e-3}
KERNELS = {
    "size": 4096,
    "cases": [
        {"case": "dequantise", "threads": 1, "smidgen": {**TIMES, "gweights_per_s_per_thread": 5.1}},
        {"case": "product M=1", "threads": 2, "smidgen": {**TIMES, "gflops": 9.0}, "speedup_over_bitsandbytes": 30.0},
    ],
    "quantise_memory": [{"storage": "nf4", "smidgen": {"ratio": 0.2}, "bitsandbytes": {"failed": "why"}}],
    **MACHINE,
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The settings that the verb made of its words."""
    asked: list[Any] = []

    def stand_in(result: dict[str, Any]) -> Callable[..., dict[str, Any]]:
        return lambda settings, report: asked.append(settings) or result

    monkeypatch.setattr(step, "bench_step", stand_in(STEP))
    monkeypatch.setattr(kernels, "bench_kernels", stand_in(KERNELS))
    monkeypatch.setattr(decode, "bench_decode", stand_in(DECODE))
    return asked


def run(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leaving:
        main(["bench", *words])
    captured = capfd.readouterr()
    return int(leaving.value.code or 0), captured.out, captured.err


def test_the_names_of_shapes_and_peers_are_those_that_exist() -> None:
    assert set(command._SHAPES) == SHAPES.keys() - {"tiny"}
    assert {"peft-bnb", "peft-bnb-ckpt"} <= STEP_PEERS.keys()


def test_step_passes_its_flags_on(asked: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    words = ["step", "--shape", "tinyllama-1.1b", "--recompute", "cheap", "--against", "peft-bnb, peft-fp32"]
    code, out, _ = run(capfd, *words, "--against-checkpointing", "--no-four-bit-tax", "--isa", "avx2", "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1]) == STEP
    (settings,) = asked
    assert settings == step.StepSettings(
        "tinyllama-1.1b",
        recompute="cheap",
        against=("peft-bnb", "peft-fp32", "peft-bnb-ckpt"),
        four_bit_tax=False,
        isa="avx2",
    )


@pytest.mark.parametrize(
    ("what", "shown"),
    [
        ("step", ["4-bit tax 1.03", "1.50 x as fast", "1.5 GB", "A processor, 2 threads", "Note: a note."]),
        ("kernels", ["5.10 G weights/s/thread", "9.0 GFLOP/s", "30.00 x", "2 ms", "0.20"]),
        ("decode", ["m.gguf: a prompt of 512 tokens", "llama.cpp", "2.50 x / 0.80 x"]),
    ],
)
def test_people_get_tables(what: str, shown: list[str], asked: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, what)
    assert code == 0
    for text in shown:
        assert text in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "WHAT: missing."),
        (("steps",), "WHAT: expected one of step, kernels, decode, memory, found 'steps'."),
        (("kernels", "--shape", "smollm2-135m"), "--shape: belongs to `smidgen bench step`, leave it out."),
        (("step", "--shape", "llama"), "--shape: expected a shape that `smidgen plan` knows, found 'llama'."),
        (("step", "--shape", "llama-7b"), "--shape: expected one of smollm2-135m, tinyllama-1.1b, found 'llama-7b'."),
        (("step", "--memory", "2GiB"), "--memory: belongs to `smidgen bench memory`, leave it out."),
        (("memory", "--against", "peft-bnb"), "--against: belongs to `smidgen bench step`, leave it out."),
        (("memory", "--memory", "0"), "--memory: expected more than 0, found '0'."),
        (("memory", "--memory", "much"), "--memory: not a size: 'much' (write 6GiB, 1.5GB or 900MB)."),
        (("step", "--against", "unsloth"), "--against: expected names out of peft-bnb,"),
        (("step", "--repeats", "0"), "--repeats: expected 1 or more, found 0."),
        (
            ("memory", "--mode", "generate", "--recompute", "full"),
            "--recompute: belongs to --mode train, leave it out.",
        ),
        (("memory", "--mode", "generate", "--micro-batch", "2"), "--micro-batch: belongs to --mode train, leave it"),
        (("memory", "--new-tokens", "9"), "--new-tokens: belongs to --mode generate, leave it out."),
        (("memory", "--shape", "llama-7b", "--layers", "33"), "--layers: expected at most the shape's 32, found 33."),
        (("memory", "--repeats", "-1"), "--repeats: expected 0 or more, found '-1'."),
        (
            ("step", "--activation-dtype", "auto"),
            "--activation-dtype: belongs to `smidgen bench memory`",
        ),
    ],
)
def test_mistakes_are_said_before_anything_runs(
    words: tuple[str, ...], said: str, asked: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capfd, *words)
    assert (code, out, asked) == (2, "", [])
    assert said in err
