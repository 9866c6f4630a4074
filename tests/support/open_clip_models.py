"""open_clip's models at a small size, with every switch of their config and no weight at its first value."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file

from treering.models.interchange.architectures import (
    config_named,
)

VOCABULARY, CONTEXT = 90, 9


def small(name: str) -> dict[str, Any]:
    """A config with every switch of `name`, of a few channels and blocks."""
    config = deepcopy(dict(config_named(name)))
    vision, text = config["vision_cfg"], config["text_cfg"]
    head = 8 + vision.get("head_width", 64) % 64 // 8  # 64 -> 8, 80 -> 10, 88 -> 11, 104 -> 13
    vision |= {"layers": 2, "width": 2 * head, "patch_size": 4, "image_size": 12}
    vision["head_width"] = head
    text |= {"layers": 2, "width": 16, "heads": 2, "vocab_size": VOCABULARY, "context_length": CONTEXT}
    config["embed_dim"] = 16
    if vision.get("attentional_pool"):
        vision["attn_pooler_queries"] = 5
    if decoder := config.get("multimodal_cfg"):
        decoder |= {"layers": 2, "width": 16, "heads": 2, "vocab_size": VOCABULARY, "context_length": CONTEXT}
    return config


def their_model(open_clip: ModuleType, config: dict[str, Any]) -> torch.nn.Module:
    """open_clip's model of a config, as its `create_model` makes it, with no weight at its first zero or one."""
    config = deepcopy(config)
    custom = config.pop("custom_text", False)
    made = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    torch.manual_seed(0)
    model = made(**config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "text_decoder.text_projection":  # which nothing ever fills
                parameter.zero_()
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


PICTURES = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.4, 0.5], "interpolation": "bicubic", "resize_mode": "shortest"}


def sized(name: str) -> dict[str, Any]:
    """A small config of `name` with CLIP's vocabulary."""
    config = small(name)
    for part in ("text_cfg", "multimodal_cfg"):
        if part in config:
            config[part] |= {"vocab_size": 49408, "context_length": 16}
    return config


def published(open_clip: ModuleType, where: Path, name: str, pictures: dict[str, Any] | None = None) -> Path:
    """A folder as open_clip pushes one to a hub."""
    where.mkdir()
    config = sized(name)
    tree = {"model_cfg": config, "preprocess_cfg": pictures or PICTURES}
    (where / "open_clip_config.json").write_text(json.dumps(tree))
    state = {key: tensor.contiguous() for key, tensor in their_model(open_clip, config).state_dict().items()}
    save_file(state, where / "open_clip_model.safetensors")
    return where
