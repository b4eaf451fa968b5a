"""Names of layers: the field's words, module names, fused layers."""

from pathlib import Path

import pytest

from smidgen.errors import SettingsError
from smidgen.lora.targets import check_pattern, fields_of, match_pattern, select_targets
from tiny import CONFIGS, build, tiny_folder


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_linear_layer_has_a_field(architecture: str, tmp_path: Path) -> None:
    base = build(tiny_folder(tmp_path, architecture))
    named = {name: fields_of(name, base.head_name) for name in base.linears}
    assert all(fields or name.endswith("shared_expert_gate") for name, fields in named.items()), named
    experts = architecture == "mixtral"
    found = {field for fields in named.values() for field in fields}
    assert found >= ({"q", "k", "v", "o", "head"} if experts else {"q", "k", "v", "o", "up", "down", "head"})


LLAMA = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]


def test_all_leaves_the_head_out() -> None:
    assert select_targets("all", [*LLAMA, "lm_head"], "lm_head") == (LLAMA, [])


def test_field_names_and_module_names_mix_and_keep_the_order_of_the_model() -> None:
    names, notes = select_targets("lm_head, v,layers.1.mlp.up_proj", [*LLAMA, "lm_head"], "lm_head")
    assert names == [LLAMA[1], LLAMA[4], LLAMA[5], "lm_head"]
    assert notes == []


def test_a_fused_layer_is_said() -> None:
    names, notes = select_targets("q", ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj"], "lm_head")
    assert names == ["h.0.attn.c_attn"]
    assert notes == ["target q is part of the fused layer c_attn: the adapter covers q, k, v together"]


def test_the_same_name_means_two_things_in_attention_and_feed_forward() -> None:
    names = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "l.0.attention.dense", "l.0.mlp.dense_4h_to_h"]
    assert select_targets("o", names, "x")[0] == ["h.0.attn.c_proj", "l.0.attention.dense"]
    assert select_targets("down", names, "x")[0] == ["h.0.mlp.c_proj", "l.0.mlp.dense_4h_to_h"]


def test_every_target_that_matches_nothing_is_named() -> None:
    with pytest.raises(SettingsError) as refused:
        select_targets("q,gate,qq_proj", LLAMA, "lm_head")
    assert str(refused.value) == (
        "targets: no layer matches gate, qq_proj, this model has q, v, up (modules q_proj, v_proj, up_proj)."
    )


@pytest.mark.parametrize(
    "key", ["q_proj", "layers.1.self_attn.q_proj", "proj", "q_proj|up_proj", ".*", "^model", "l.*up"]
)
def test_patterns_match_as_in_peft(key: str) -> None:
    peft_other = pytest.importorskip("peft.utils.other")
    for name in [*LLAMA, "lm_head"]:
        theirs = peft_other.get_pattern_key([key, "v_proj"], name)
        assert match_pattern({key: 1, "v_proj": 2}, name) == (None if theirs == name else theirs)


def test_every_pattern_that_no_layer_is_left_for_is_named() -> None:
    check_pattern("rank_pattern", {"layers.1.*": 1, "q_proj": 2}, LLAMA)
    with pytest.raises(SettingsError) as refused:
        check_pattern("rank_pattern", {"q_proj": 2, "layers.1.self_attn.q_proj": 1, "gate": 3}, LLAMA)
    assert str(refused.value) == (
        "rank_pattern: no adapted layer is left for layers.1.self_attn.q_proj, gate, there are q_proj, v_proj, up_proj."
    )
