"""Checkpoints as trainings leave them: whatever stands around the model's names, its tensors are found, or named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from treering.models.interchange.errors import InterchangeError
from treering.models.interchange.files import read_state
from treering.models.interchange.weights import from_open_clip, to_open_clip
from treering.models.interchange.wrapped import flat, unwrapped
from treering.models.model import build
from treering.models.spec import ImageSpec, ModelSpec, TextSpec

SPEC = ModelSpec(
    embed_dim=8,
    image=ImageSpec(
        width=8,
        depth=2,
        heads=2,
        patch=4,
        resolution=8,
        class_token=True,
        pool="class",
        patch_bias=False,
        pre_norm=True,
    ),
    text=TextSpec(width=8, depth=2, heads=2, context=6, vocabulary=20),
)
OURS = dict(build(SPEC, 0).named_parameters())
STATE: dict[str, Tensor] = {name: tensor.detach() for name, tensor in to_open_clip(SPEC, OURS).items()}
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(4.0)}}, "param_groups": [{"lr": 1e-3}]}


def same(state: dict[str, Tensor], of: dict[str, Tensor] = STATE) -> bool:
    """Whether the model in `state` is the one of `of`, bit for bit."""
    found, expected = from_open_clip(SPEC, state), from_open_clip(SPEC, of)
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def named(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def inside(word: str) -> dict[str, Tensor]:
    """Wrappers around every block and around the image tower."""
    found = {}
    for name, tensor in STATE.items():
        parts = name.split(".")
        at = parts.index("resblocks") + 2 if "resblocks" in parts else len(parts) - 1
        found[".".join([*parts[:at], word, *parts[at:]])] = tensor
    return found


TREES: dict[str, Any] = {
    "ddp": named("module."),
    "compile": named("_orig_mod."),
    "ddp of compile": named("module._orig_mod."),
    "compile of ddp": named("_orig_mod.module."),
    "fsdp": inside("_fsdp_wrapped_module"),
    "fsdp and its checkpoint wrapper": inside("_fsdp_wrapped_module._checkpoint_wrapped_module"),
    "fairscale": inside("_fpw_module"),
    "compiled blocks": inside("_orig_mod"),
    "lightning": {"state_dict": named("model."), "epoch": 3, "optimizer_states": [OPTIMIZER]},
    "lightning deeper": {"state_dict": named("net.clip._orig_mod."), "callbacks": {"x": {"best": torch.tensor(1.0)}}},
    "model": {"model": STATE, "optimizer": OPTIMIZER, "step": 10},
    "model of model": {"model": {"model": named("module.")}},
    "open_clip": {"epoch": 3, "name": "x", "state_dict": named("module."), "optimizer": OPTIMIZER},
    "model_state_dict": {"model_state_dict": named("module."), "scaler": {"scale": torch.tensor(2.0)}},
    "deepspeed": {"module": STATE, "buffer_names": [], "ds_config": {"a": {"b": torch.ones(1)}}, "global_steps": 3},
    "ema beside": {"state_dict": STATE, "state_dict_ema": OTHER},
    "ema before": {"ema": {"module": OTHER}, "model": STATE},
    "ema among the names": {**named("model."), **named("model_ema.", OTHER)},
    "ema beside bare names": {**STATE, **named("ema_model.module.", OTHER)},
    "ema without dots": {**STATE, "model_ema.visualproj": torch.ones(2), "model_ema.num_updates": torch.tensor(3)},
    "swa": {**named("module."), "n_averaged": torch.tensor(7)},
    "teacher": {**named("student."), **named("teacher.", OTHER)},
    "only an average": {"state_dict_ema": STATE},
    "a loss beside": {"state_dict": {**named("model."), "loss_fn.weight": torch.ones(3)}},
    "equal twice": {**STATE, **named("module.")},
}


@pytest.mark.parametrize("kind", TREES)
def test_the_model_is_found(kind: str, tmp_path: Path) -> None:
    torch.save(TREES[kind], tmp_path / "weights.pt")
    assert same(read_state(tmp_path / "weights.pt"))


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(["module.", "_orig_mod.", "model.", "net.", "clip.", "state_dict.", "backbone."])),
    st.lists(st.sampled_from(["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"])),
    st.integers(0, 3),
)
def test_in_any_order_and_nesting(before: list[str], within: list[str], at: int) -> None:
    def dressed(name: str) -> str:
        parts = name.split(".")
        return "".join(before) + ".".join([*parts[:at], *within, *parts[at:]] if at < len(parts) else parts)

    assert same({dressed(name): tensor for name, tensor in STATE.items()})


def hugging_face() -> dict[str, Tensor]:
    """The names of transformers' CLIPModel, module by module, as its own conversion from CLIP fills them."""
    found: dict[str, Tensor] = {"logit_scale": STATE["logit_scale"]}

    def tower(theirs: str, ours: str, depth: int) -> None:
        for number in range(depth):
            layer, block = f"{theirs}.encoder.layers.{number}", f"{ours}transformer.resblocks.{number}"
            for kind in ("weight", "bias"):
                q, k, v = STATE[f"{block}.attn.in_proj_{kind}"].chunk(3)
                found[f"{layer}.self_attn.q_proj.{kind}"] = q
                found[f"{layer}.self_attn.k_proj.{kind}"] = k
                found[f"{layer}.self_attn.v_proj.{kind}"] = v
                found[f"{layer}.self_attn.out_proj.{kind}"] = STATE[f"{block}.attn.out_proj.{kind}"]
                found[f"{layer}.layer_norm1.{kind}"] = STATE[f"{block}.ln_1.{kind}"]
                found[f"{layer}.layer_norm2.{kind}"] = STATE[f"{block}.ln_2.{kind}"]
                found[f"{layer}.mlp.fc1.{kind}"] = STATE[f"{block}.mlp.c_fc.{kind}"]
                found[f"{layer}.mlp.fc2.{kind}"] = STATE[f"{block}.mlp.c_proj.{kind}"]

    tower("vision_model", "visual.", 2)
    tower("text_model", "", 2)
    for kind in ("weight", "bias"):
        found[f"vision_model.pre_layrnorm.{kind}"] = STATE[f"visual.ln_pre.{kind}"]
        found[f"vision_model.post_layernorm.{kind}"] = STATE[f"visual.ln_post.{kind}"]
        found[f"text_model.final_layer_norm.{kind}"] = STATE[f"ln_final.{kind}"]
    found["vision_model.embeddings.class_embedding"] = STATE["visual.class_embedding"]
    found["vision_model.embeddings.patch_embedding.weight"] = STATE["visual.conv1.weight"]
    found["vision_model.embeddings.position_embedding.weight"] = STATE["visual.positional_embedding"]
    found["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    found["text_model.embeddings.token_embedding.weight"] = STATE["token_embedding.weight"]
    found["text_model.embeddings.position_embedding.weight"] = STATE["positional_embedding"]
    found["text_model.embeddings.position_ids"] = torch.arange(6)[None]
    found["visual_projection.weight"] = STATE["visual.proj"].T.contiguous()
    found["text_projection.weight"] = STATE["text_projection"].T.contiguous()
    return found


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "state_dict.clip._orig_mod."])
def test_hugging_faces_names(prefix: str) -> None:
    assert same(named(prefix, hugging_face()))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({**named("a."), **named("b.", OTHER)}, r"holds 2 models, under 'a\.', 'b\.'; keep one"),
        (
            {**STATE, **named("module.", OTHER)},
            r"holds visual\.class_embedding twice|holds .* twice, as .* and module\.",
        ),
        ({**STATE, "extra.weight": torch.ones(1)}, r"also has extra\.weight"),
        (named("base_model.model."), None),
        ({"visual.blocks.0.lora_A.weight": torch.ones(1)}, "adapters"),
        ({"_fsdp_wrapped_module._flat_param": torch.ones(9)}, "flat parameters; save a full state dict"),
        ({"visual.trunk.patch_embed.proj.weight": torch.ones(1)}, "image tower of timm's"),
        ({"image.patches.weight": torch.ones(1)}, "Treering's own weights"),
        ({"optimizer.state.0.exp_avg": torch.ones(1)}, "the state of an optimizer"),
        ({**STATE, "visual.proj": torch.ones(8, 8, dtype=torch.int8)}, "visual.proj holds int8 instead of floats"),
        ({**STATE, "visual.proj": torch.full((8, 8), float("nan"))}, "visual.proj holds 64 numbers of 64 that are NaN"),
        ({**STATE, "logit_scale": torch.tensor(float("inf"))}, "logit_scale holds 1 numbers? of 1 that are NaN or inf"),
        ({**STATE, "ln_final.bias": torch.full((8,), 1e39, dtype=torch.float64)}, "ln_final.bias holds 8 numbers of 8"),
        ({**STATE, "ln_final.bias": torch.tensor([7e4] * 8).half()}, "ln_final.bias holds 8 numbers of 8"),
    ],
)
def test_what_is_not_the_model_is_named_for_what_it_is(state: dict[str, Tensor], message: str | None) -> None:
    if message is None:
        assert same(state)
        return
    with pytest.raises(InterchangeError, match=message):
        from_open_clip(SPEC, state)


def test_what_is_left_out_is_said() -> None:
    assert unwrapped(STATE).notes == ()
    assert unwrapped(flat(TREES["ema beside"])).notes == (
        "the file also holds a model under 'state_dict_ema.', an average or a teacher, which is left out",
    )
    assert (
        "left out, as it is not the model's: queue" in unwrapped({**named("model."), "queue": torch.ones(1)}).notes[0]
    )
    assert "these weights are under 'state_dict_ema.'" in unwrapped(flat(TREES["only an average"])).notes[0]


def test_a_tree_without_an_end_is_cut() -> None:
    tree: dict[str, Any] = {"x": torch.ones(1)}
    for _ in range(5000):
        tree = {"a": tree}
    assert flat(tree) == {}
