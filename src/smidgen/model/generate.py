"""Token by token with a KV cache: one prompt as a stream, or many prompts as a batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from smidgen.errors import DataError, SettingsError
from smidgen.model.build import Base
from smidgen.model.decoder import decoder_for

__all__ = ["Sampling", "generate_batch", "room_after", "stream_text", "stream_tokens"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0: always the likeliest. top_k 0 and top_p 1: no cut."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        problems = []
        if self.temperature < 0:
            problems.append(f"temperature: expected 0 or more, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p: expected more than 0 and at most 1, found {self.top_p}")
        if self.top_k < 0:
            problems.append(f"top_k: expected 0 or more, found {self.top_k}")
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens: expected 1 or more, found {self.max_new_tokens}")
        if problems:
            raise SettingsError(problems)

    def chooser(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function logits [B, vocab] -> token ids [B], with its own random generator."""
        generator = torch.Generator().manual_seed(self.seed)

        def choose(logits: torch.Tensor) -> torch.Tensor:
            if self.temperature == 0:
                return logits.argmax(dim=-1)
            probabilities = _cut(logits.float().cpu() / self.temperature, self.top_k, self.top_p).softmax(dim=-1)
            return torch.multinomial(probabilities, 1, generator=generator).squeeze(1).to(logits.device)

        return choose


def _cut(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Everything but the top_k likeliest, and but the smallest set with probability top_p, at -inf."""
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, index, ordered)
    return logits


def room_after(base: Base, prompt_tokens: int, sampling: Sampling) -> int:
    """How many tokens may follow the prompt. Raises DataError for a prompt that leaves no position free."""
    if prompt_tokens >= base.max_positions:
        raise DataError(
            f"the prompt has {prompt_tokens} tokens", expected=f"fewer than the model's {base.max_positions} positions"
        )
    return min(sampling.max_new_tokens, base.max_positions - prompt_tokens + 1)


@torch.inference_mode()
def stream_tokens(
    base: Base, prompt: Sequence[int], stop_ids: Sequence[int], sampling: Sampling, vocab_size: int
) -> Iterator[int]:
    """Yields new token ids; a stop token ends the stream and is not yielded."""
    choose, stops, decoder = sampling.chooser(), set(stop_ids), decoder_for(base)
    tokens = torch.empty(0, dtype=torch.int64)
    room = room_after(base, len(prompt), sampling)
    for count in range(room):
        hidden = decoder.step(tokens) if count else decoder.start([prompt], room)
        tokens = choose(base.logits_of(hidden)[:, :vocab_size])
        token = int(tokens)
        if token in stops:
            return
        yield token


def stream_text(tokens: Iterator[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Pieces of text as tokens come; a character whose bytes are not all there yet is held back."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue
        if text.startswith(shown) and len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    rest = decode(ids)
    if rest.startswith(shown) and len(rest) > len(shown):
        yield rest[len(shown) :]


@torch.inference_mode()
def generate_batch(
    base: Base, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], sampling: Sampling, vocab_size: int
) -> list[list[int]]:
    """New token ids for each prompt, stop token left out. Each has the room of its own length, not of the longest's."""
    choose, stops, decoder = sampling.chooser(), set(stop_ids), decoder_for(base)
    answers: list[list[int]] = [[] for _ in prompts]
    batch = list(range(len(prompts)))  # row of the decoder -> index of the prompt
    ended: set[int] = set()
    rooms = [room_after(base, len(prompt), sampling) for prompt in prompts]
    most = max(len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True))
    hidden, tokens = decoder.start(prompts, most - max(map(len, prompts))), torch.empty(0, dtype=torch.int64)
    for count in range(1, max(rooms) + 1):
        if count > 1:
            hidden = decoder.step(tokens)
        tokens = choose(base.logits_of(hidden)[:, :vocab_size])
        for index, token in zip(batch, tokens.tolist(), strict=True):
            if token in stops:
                ended.add(index)
            elif index not in ended:
                answers[index].append(token)
        full = [index for index in batch if rooms[index] == count]
        ended.update(full)
        running = [row for row, index in enumerate(batch) if index not in ended]
        if not running:
            break
        # those that have ended leave the batch, not one by one, the cache is copied; but no row outgrows its positions
        if full or len(running) <= len(batch) // 2:
            decoder.keep(running)
            batch, tokens = [batch[row] for row in running], tokens[running]
    return answers
