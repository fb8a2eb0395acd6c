"""Files of prompts: they come back as they were, bound to their backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from support_vit import build_vit, images

from wsi_engine.encoders.weights import digest_state
from wsi_engine.models.prompt import PromptedViT, PromptError
from wsi_engine.models.prompt_files import PROMPT_FILE, load_prompts, read_prompts_card, save_prompts


@pytest.mark.parametrize(("deep", "count", "pooling"), [(False, 1, "cls"), (True, 3, "cls+mean"), (False, 0, "token")])
def test_prompts_come_back_as_they_were(tmp_path: Path, deep: bool, count: int, pooling: Any) -> None:
    network, path = build_vit().eval(), tmp_path / "prompts.safetensors"
    module, digest = PromptedViT(network, count, deep, pooling), digest_state(network.state_dict())
    save_prompts(module, path, digest, {"encoder": {"name": "vit"}, "classes": ["a", "ç"]})
    before = torch.get_rng_state()
    again = load_prompts(path, network, digest)
    assert torch.equal(before, torch.get_rng_state())
    assert (again.count, again.deep, again.pooling, again.training) == (count, deep, pooling, False)
    assert torch.equal(again(images()), module(images()))
    card = read_prompts_card(path)
    assert (card["backbone"], card["classes"], card["width"], card["layers"]) == (digest, ["a", "ç"], 192, 3)
    assert set(load_file(path)) == {"prompts"}
    assert path.stat().st_size < 4 * module.prompts.numel() + 1000
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_prompts_of_another_backbone_are_refused(tmp_path: Path) -> None:
    network, other, path = build_vit(), build_vit(seed=4), tmp_path / "prompts.safetensors"
    digest = digest_state(network.state_dict())
    save_prompts(PromptedViT(network, 1), path, digest)
    with pytest.raises(PromptError, match=f"weights {digest[:12]} and this one has .*; load the weights"):
        load_prompts(path, other, digest_state(other.state_dict()))
    for shape, name in (({"depth": 2}, "layers 3"), ({"embed_dim": 96}, "width 192")):
        with pytest.raises(PromptError, match=name):
            load_prompts(path, build_vit(**shape), digest)
    with pytest.raises(PromptError, match="ResNet is none"):
        load_prompts(path, timm.create_model("resnet18", num_classes=0), digest)
    with pytest.raises(PromptError, match="digest must be"):
        load_prompts(path, network, "")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": 2}, "version 2 and this engine reads version 1"),
        ({"prompts": 2}, r"prompts of shape \(1, 1, 192\) where its other tensors ask for \(1, 2, 192\)"),
        ({"prompts": -1}, "at least 0"),
        ({"pooling": "max"}, "not 'max'"),
        ({"deep": 1}, "lacks one of version, prompts, deep"),
    ],
)
def test_damaged_cards_of_prompts_are_refused(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    network, path = build_vit(), tmp_path / "prompts.safetensors"
    module = PromptedViT(network, 1)
    save_prompts(module, path, "d" * 64)
    card = read_prompts_card(path) | change
    save_file({"prompts": module.prompts.detach()}, path, metadata={PROMPT_FILE.key: json.dumps(card)})
    with pytest.raises(PromptError, match=match):
        load_prompts(path, network, "d" * 64)


def test_what_holds_no_prompts_is_refused(tmp_path: Path) -> None:
    network, path = build_vit(), tmp_path / "prompts.safetensors"
    module = PromptedViT(network, 1)
    with pytest.raises(PromptError, match="no file of prompts"):
        load_prompts(path, network, "d")
    save_file({"prompts": module.prompts.detach()}, path)
    with pytest.raises(PromptError, match="no card of prompts; give a file that save_prompts wrote"):
        load_prompts(path, network, "d")
    path.write_bytes(b"nothing")
    with pytest.raises(PromptError, match="cannot be read as safetensors"):
        read_prompts_card(path)
    with pytest.raises(PromptError, match="gives deep as True, and the prompts' own is False"):
        save_prompts(module, path, "d", {"deep": True})
    with torch.no_grad():
        module.prompts[0, 0, 0] = float("nan")
    save_prompts(module, path, "d")
    with pytest.raises(PromptError, match="NaN or infinite weights in prompts"):
        load_prompts(path, network, "d")
