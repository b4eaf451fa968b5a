"""NEFTune: how much noise, where, and where none."""

import math
from pathlib import Path

import pytest
import torch

from smidgen.data.batch import make_batch
from smidgen.data.render import Example
from smidgen.train.noise import embedding_noise
from tiny import build, tiny_folder

LENGTHS = [9, 40, 25]
ALPHA = 5.0


@pytest.mark.parametrize(
    ("architecture", "packs", "dtype"),
    [
        ("llama", True, torch.float32),
        ("llama", True, torch.bfloat16),  # tiles are filled up, in the middle of the batch too
        ("gemma3", True, torch.float32),
        ("gemma3", False, torch.float32),
    ],
)
def test_each_row_gets_uniform_noise_by_its_own_length_and_only_in_training(
    architecture: str, packs: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Rows one behind the other, in the two shapes that layers take, and padded."""
    base = build(tiny_folder(tmp_path, architecture), dtype=dtype)
    base.packs, base.tile_tokens = packs, 48
    batch = make_batch([Example([number] * length, [1] * length, False, "") for number, length in enumerate(LENGTHS)])
    embedding = base.model.get_input_embeddings()
    seen: list[torch.Tensor] = []

    def embedded() -> torch.Tensor:
        handle = embedding.register_forward_hook(lambda module, given, result: seen.append(result.detach()))
        base.hidden_of_rows(batch.input_ids, batch.lengths)
        handle.remove()
        return seen.pop()

    plain = embedded()
    with embedding_noise(base, ALPHA) as noise_on:
        noise_on(batch.lengths)
        assert torch.equal(embedded(), plain)  # evaluation
        base.model.train()
        noise = embedded() - plain
        assert not torch.equal(embedded() - plain, noise)  # drawn anew for each batch
        torch.manual_seed(7)
        again = embedded()
        torch.manual_seed(7)
        assert torch.equal(embedded(), again)  # from torch's generator, which a checkpoint keeps
    assert torch.equal(embedded(), plain)  # nothing is left behind
    noise = noise.flatten(0, -2).float()
    real = torch.cat([torch.arange(length) + number * max(LENGTHS) for number, length in enumerate(LENGTHS)])
    places = real if base.packed is None else base.packed.places
    lost = torch.finfo(dtype).eps * float(embedded().abs().max())  # of the noise, in the sum and its rounding
    for row, length in zip(noise[places].split(LENGTHS), LENGTHS, strict=True):
        bound = ALPHA / math.sqrt(length * 64)
        # of >= 9 x 64 draws the largest is near to the bound
        assert 0.98 * bound - lost < float(row.abs().max()) <= bound * (1 + 1e-5) + lost
        assert abs(float(row.mean())) < bound / 10  # the mean of 576 uniform numbers: a standard error of 0.024 bounds


def test_without_alpha_no_number_is_drawn(tmp_path: Path) -> None:
    base = build(tiny_folder(tmp_path))
    state = torch.get_rng_state()
    with embedding_noise(base, 0.0) as noise_on:
        noise_on(torch.tensor([3]))
        base.model.train()
        base.hidden_of_rows(torch.tensor([[1, 2, 3]]), torch.tensor([3]))
    assert torch.equal(torch.get_rng_state(), state)
