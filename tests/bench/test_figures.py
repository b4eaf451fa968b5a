"""The formulas behind the figures, against numbers worked out by hand and against a model that is built."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from smidgen.bench.figures import paired_ratio, roofline_fraction, shape_flops, spread, useful_flops
from smidgen.bench.shapes import SHAPES


def test_useful_work_of_a_step_is_the_formula_by_hand() -> None:
    flops = useful_flops(linear_parameters=1000, lora_parameters=100, tokens=10, hidden_size=8, num_layers=2)
    assert flops == 4 * 1000 * 10 + 6 * 100 * 10 + 6 * 10**2 * 8 * 2


def test_useful_work_of_smollm2_is_that_of_the_baselines() -> None:
    # 106.2M decoder weights, 28.3M of the head, 4.88M of adapters, 512 tokens, 576 x 30.
    assert shape_flops(SHAPES["smollm2-135m"], 512, 16) == pytest.approx(3.178e11, rel=1e-3)


@pytest.mark.parametrize("name", ["smollm2-135m", "tinyllama-1.1b", "tiny"])
def test_a_shape_counts_what_transformers_builds(name: str) -> None:
    import torch

    shape = SHAPES[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape.config()))
    built = {key: tuple(tensor.shape) for key, tensor in model.named_parameters()}
    assert dict(shape.tensors()) == built
    linear = sum(
        m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    )
    assert shape.decoder_parameters == linear
    assert shape.head_parameters == model.lm_head.weight.numel()


def test_published_sizes_of_the_shapes() -> None:
    assert SHAPES["smollm2-135m"].lora_parameters(16) == 4_884_480  # what `smidgen finetune` reports for this model
    assert SHAPES["tinyllama-1.1b"].decoder_parameters == pytest.approx(0.969e9, rel=1e-3)


def test_a_slow_moment_of_the_machine_does_not_change_its_fraction() -> None:
    steps = [
        {"step_s": 1.0, "sgemm_gflops": [100.0, 100.0]},
        {"step_s": 2.0, "sgemm_gflops": [40.0, 60.0]},
        {"step_s": 1.0, "sgemm_gflops": [110.0, 90.0]},
    ]
    assert roofline_fraction(50e9, steps) == pytest.approx(0.5)


def test_ratios_are_paired_before_their_median_is_taken() -> None:
    # The machine was twice as slow in the second round, for both.
    assert paired_ratio([3.0, 6.0, 3.0], [1.0, 2.0, 2.0]) == 3.0
    with pytest.raises(ValueError, match="longer"):  # one round too many on one side
        paired_ratio([1.0], [1.0, 2.0])


def test_spread_names_its_three_values() -> None:
    assert spread([3.0, 1.0, 2.0], "step_s") == {"step_s": 2.0, "step_s_min": 1.0, "step_s_max": 3.0}
    assert spread([3.0, 1.0], "") == {"median": 2.0, "min": 1.0, "max": 3.0}
