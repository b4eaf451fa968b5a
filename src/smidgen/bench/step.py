"""`smidgen bench step`: one training step, ours and theirs, in turn."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from smidgen.bench.controller import Worker, start_worker
from smidgen.bench.figures import paired_ratio, roofline_fraction, shape_flops, spread
from smidgen.bench.machine import describe
from smidgen.bench.peers import STEP_PEERS, StepPeer, peer_interpreter
from smidgen.bench.places import passing_folder
from smidgen.bench.shapes import SHAPES, Shape, random_token_ids, warm_page_cache, write_model
from smidgen.errors import RunError
from smidgen.events import Note, Progress, Report, Warned, silent

__all__ = ["StepSettings", "bench_step", "model_folder"]

STORAGE = "nf4-dq"
RANK, ALPHA, LEARNING_RATE = 16, 32.0, 1e-4
# Of the first peer, with "peer_" in front.
_PEER_KEYS = (
    "step_s",
    "step_s_min",
    "step_s_max",
    "peak_rss_bytes",
    "roofline_fraction",
    "load_s",
    "load_peak_rss_bytes",
)


@dataclass(frozen=True)
class StepSettings:
    """What is measured. against: names of STEP_PEERS. isa: "avx2" keeps all sides to it. keep: where weights stay."""

    shape: str
    seq_len: int = 512
    recompute: str = "none"
    compute_dtype: str = "float32"
    repeats: int = 7
    against: tuple[str, ...] = ()
    four_bit_tax: bool = True
    isa: str = ""
    keep: Path | None = None


@dataclass
class _Side:
    """One worker with what it said: `loaded` once, `steps` after each round."""

    name: str
    worker: Worker
    loaded: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)

    def times_s(self) -> list[float]:
        return [step["step_s"] for step in self.steps]

    def peak_rss_bytes(self) -> int:
        return max(step["peak_rss_bytes"] for step in self.steps)

    def figures(self, flops: float) -> dict[str, Any]:
        return {
            **{key: self.loaded[key] for key in ("load_s", "load_peak_rss_bytes", "trainable_parameters")},
            **spread(self.times_s(), "step_s"),
            "peak_rss_bytes": self.peak_rss_bytes(),
            "roofline_fraction": roofline_fraction(flops, self.steps),
            "sgemm_gflops": median(gflops for step in self.steps for gflops in step["sgemm_gflops"]),
            "loss": [step["loss"] for step in self.steps],
            "repeats": self.steps,
        }


def bench_step(settings: StepSettings, report: Report = silent) -> dict[str, Any]:
    """Start all sides over the same files, warm each up with one step, then `repeats` rounds of one step each.

    Peers that cannot be had are left out with a warning and listed with the reason.
    """
    shape, threads = SHAPES[settings.shape], torch.get_num_threads()
    with ExitStack() as stack:
        folder = stack.enter_context(model_folder(shape, settings.keep, report))
        session = _Session(stack, settings, shape, folder, threads, report)
        sides = [session.start("smidgen", STORAGE)]
        if settings.four_bit_tax:
            sides.append(session.start("dense", "none"))
        peers, skipped = session.start_peers()
        sides += peers
        _measure(sides, settings.repeats, report)
    return _result(settings, threads, sides, skipped)


@contextmanager
def model_folder(shape: Shape, keep: Path | None, report: Report) -> Iterator[Path]:
    """The folder with the random weights: below `keep`, used again if it is there, or one that is removed at the end.

    Its files are in the page cache, so that whoever loads first has no harder start than who comes next.
    """
    with ExitStack() as stack:
        keep = keep or stack.enter_context(passing_folder("weights"))
        folder = write_model(shape, keep / shape.name, report).resolve()
        warm_page_cache(folder)
        yield folder


@dataclass(frozen=True)
class _Session:
    """Starts workers that end with the stack."""

    stack: ExitStack
    settings: StepSettings
    shape: Shape
    folder: Path
    threads: int
    report: Report

    def start(self, name: str, storage: str) -> _Side:
        """Our step over the base stored in this way."""
        self.report(Note(f"{name}: loading as {storage}"))
        worker = self._worker(name, "step_smidgen", None)
        chosen = {"compute_dtype": self.settings.compute_dtype, "recompute": self.settings.recompute}
        return _Side(name, worker, worker.ask("load", storage=storage, **chosen, **self._common()))

    def start_peers(self) -> tuple[list[_Side], dict[str, str]]:
        """(the peers that start, name -> reason for those that do not)."""
        sides, skipped = [], {}
        for peer in (STEP_PEERS[name] for name in dict.fromkeys(self.settings.against)):
            try:
                sides.append(self._start_peer(peer))
            except RunError as error:
                skipped[peer.name] = str(error)
                self.report(Warned(f"{peer.name} is skipped: {error}"))
        return sides, skipped

    def _start_peer(self, peer: StepPeer) -> _Side:
        interpreter = peer_interpreter("peft", peer.needs, self.report)
        self.report(Note(f"{peer.name}: loading ({peer.what})"))
        worker = self._worker(peer.name, "step_peft", interpreter)
        try:
            return _Side(peer.name, worker, worker.ask("load", **peer.settings, **self._common()))
        except RunError:
            worker.close()  # what it holds in memory is not wanted
            raise

    def _worker(self, name: str, program: str, interpreter: Path | None) -> Worker:
        isa = self.settings.isa
        return self.stack.enter_context(
            start_worker(name, program, interpreter=interpreter, threads=self.threads, isa=isa)
        )

    def _common(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "input_ids": random_token_ids(self.shape, self.settings.seq_len),
            "rank": RANK,
            "alpha": ALPHA,
            "learning_rate": LEARNING_RATE,
            "probe_width": 256 if self.shape.name == "tiny" else 4096,
        }


def _measure(sides: Sequence[_Side], repeats: int, report: Report) -> None:
    """One unreported step each, then the rounds: each side takes one step after the other's."""
    what = f"steps of {', '.join(side.name for side in sides)}"
    total = (repeats + 1) * len(sides)
    for number in range(repeats + 1):
        for place, side in enumerate(sides):
            report(Progress(what, number * len(sides) + place, total))
            step = side.worker.ask("step")
            if number:
                side.steps.append(step)
    report(Progress(what, total, total))


def _result(settings: StepSettings, threads: int, sides: list[_Side], skipped: dict[str, str]) -> dict[str, Any]:
    """The object of --json: our figures flat, `peer_...` for the first peer, `peers` with all of them."""
    flops = shape_flops(SHAPES[settings.shape], settings.seq_len, RANK)
    by_name = {side.name: side for side in sides}
    ours = by_name.pop("smidgen")
    dense = by_name.pop("dense", None)
    peers = [_peer_figures(STEP_PEERS[name], side, ours, flops) for name, side in by_name.items()]
    first: dict[str, Any] = peers[0] if peers else {}
    versions = {name: v for side in sides for name, v in side.loaded["versions"].items()}
    return {
        "shape": settings.shape,
        "seq_len": settings.seq_len,
        "recompute": settings.recompute,
        "compute_dtype": settings.compute_dtype,
        "storage": STORAGE,
        "rank": RANK,
        "repeats_wanted": settings.repeats,
        "useful_flops": flops,
        **ours.figures(flops),
        "tokens_per_s": settings.seq_len / median(ours.times_s()),
        "against": first.get("name"),
        "speedup": first.get("speedup"),
        **{f"peer_{key}": first.get(key) for key in _PEER_KEYS},
        "four_bit_tax": paired_ratio(ours.times_s(), dense.times_s()) if dense else None,
        "dense": dense.figures(flops) if dense else None,
        "peers": peers,
        "skipped": skipped,
        "notes": _notes(sides),
        **describe(settings.isa, threads, versions),
        "cpu_capability": {side.name: side.loaded["cpu_capability"] for side in sides},
    }


def _peer_figures(peer: StepPeer, side: _Side, ours: _Side, flops: float) -> dict[str, Any]:
    return {
        "name": peer.name,
        "what": peer.what,
        "settings": peer.settings,
        "speedup": paired_ratio(side.times_s(), ours.times_s()),
        "memory_ratio": ours.peak_rss_bytes() / side.peak_rss_bytes(),
        **side.figures(flops),
    }


def _notes(sides: list[_Side]) -> list[str]:
    return [
        f"{side.name}: bitsandbytes could not be kept to the instruction set, it uses AVX-512 where that is there"
        for side in sides
        if not side.loaded.get("kept_to_isa", True)
    ]
