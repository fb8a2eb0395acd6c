"""Checkpoints that mean harm."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from support_mutation import pick, spoil_bytes, spoil_json, spoil_json_text


def make_checkpoints(folder: Path) -> list[tuple[str, bytes]]:
    """Heads, prompts, networks: ours in safetensors, CLAM's by torch.save."""
    import torch
    from support_runs import make_card, make_origin

    from wsi_engine.models import create_head, save_head
    from wsi_engine.models.nuclei_net import NucleiNet, NucleiNetSettings, save_nuclei_net
    from wsi_engine.models.scale_attention import ScaleAttention, ScaleAttentionSettings
    from wsi_engine.models.scale_files import save_scale_attention

    origin = make_origin(8)
    head = create_head("clam_sb", 8, 2)
    save_head(head, folder / "clam.safetensors", make_card(origin, ("a", "b"), 0, 1.0))
    save_head(create_head("mean", 8, 2), folder / "mean.safetensors", make_card(origin, ("a", "b"), 0, 1.0))
    torch.save(dict(head.state_dict()), folder / "clam.pt")
    torch.save({"state_dict": create_head("dsmil", 8, 2).state_dict()}, folder / "dsmil.pt",
               _use_new_zipfile_serialization=False)  # fmt: skip
    save_nuclei_net(NucleiNet(NucleiNetSettings((4, 8))), folder / "nuclei.safetensors", 0.5)
    network = ScaleAttention(ScaleAttentionSettings(4, (1, 2)), seed=0)
    network.train()
    network(torch.zeros(2, 3, 32, 32))
    save_scale_attention(network, folder / "scale.safetensors")
    return [(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]


def spoil_checkpoint(sound: Any, place: Path, rng: np.random.Generator) -> Path:
    """A checkpoint with a changed header (lengths, shapes, offsets, the card) or changed bytes, or a hostile pickle."""
    name, data = pick(rng, sound)
    path: Path = place / name
    if name.endswith(".pt") and rng.random() < 0.3:
        write_hostile(path, rng)
        return path
    if name.endswith(".safetensors") and rng.random() < 0.6:
        (length,) = struct.unpack_from("<Q", data)
        text = spoil_card(data[8 : 8 + length], rng)
        data = struct.pack("<Q", len(text)) + text + data[8 + length :]
    if rng.random() < 0.4:
        data = spoil_bytes(data, rng, near=pick(rng, (8, 300, None)))
    path.write_bytes(data)
    return path


def spoil_card(text: bytes, rng: np.random.Generator) -> bytes:
    """The JSON header of a safetensors file; half of the time the card inside of it."""
    header = json.loads(text)
    cards = header.get("__metadata__") or {}
    key = next(iter(cards), None)
    if key is None or rng.random() < 0.5:
        return spoil_json_text(text, rng)
    card = spoil_json(json.loads(cards[key]), rng)
    return json.dumps(header | {"__metadata__": {key: json.dumps(card)}}).encode()


class Payload:
    """Writes a file outside of the place when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.mark), "w")


def write_hostile(path: Path, rng: np.random.Generator) -> None:
    """A pickle that runs code, tensors larger than their memory, or other things than tensors by name."""
    import torch

    big = torch.zeros(1).expand(1 << 20, 1 << 20)
    first, last = "attention_net.0.weight", "classifiers.weight"
    mark = path.parents[1] / "ran"
    contents: list[Any] = [
        Payload(mark),
        {"a": Payload(mark)},
        {first: big, last: big},
        {first: torch.zeros(1).expand(1 << 40, 2)},
        {first: torch.eye(3).to_sparse()},
        {first: torch.empty(3, 3, device="meta")},
        {1: torch.zeros(1)},
        {},
        [],
        None,
        {first: torch.zeros(0, 0)},
        {first: torch.zeros(2, 2, dtype=torch.complex64)},
        {"state_dict": {"state_dict": {"model": {}}}},
        {first: torch.zeros(512, 8), "attention_net.3.module.0.weight": big},
        {"b_classifier.fcc.weight": big},
        {"_fc1.0.weight": big, "layer1.attn.res_conv.weight": torch.zeros(1, 1, 1, 1)},
        {first: torch.full((4, 4), float("nan"))},
        {first: torch.nn.Parameter(torch.zeros(2, 2))},
    ]
    torch.save(pick(rng, contents), path, _use_new_zipfile_serialization=bool(rng.random() < 0.7))


def read_checkpoint(given: Path, place: Path) -> None:
    """Every reader of models, each of which must refuse what is not its own; then the engine's own ways in."""
    from wsi_engine.models import load_head, read_head_card
    from wsi_engine.models.nuclei_net import load_nuclei_net
    from wsi_engine.models.scale_files import load_scale_attention

    name = given.name
    if name == "nuclei.safetensors":
        load_nuclei_net(given)
    elif name == "scale.safetensors":
        load_scale_attention(given)
    else:
        load_head(given)
        if given.suffix == ".safetensors":
            read_head_card(given)


def use_checkpoint(given: Path, place: Path) -> None:
    """The engine's ways to a checkpoint: heads of a run, networks for nuclei, weights of an encoder."""
    from wsi_engine.classification.ensemble import load_ensemble
    from wsi_engine.encoders.weights import read_state
    from wsi_engine.nuclei.method import create_method
    from wsi_engine.nuclei.scale_method import ScaleMethod

    if given.name == "nuclei.safetensors":
        create_method("student", given, "cpu")
    elif given.name == "scale.safetensors":
        ScaleMethod(given)
    elif given.suffix == ".safetensors":
        load_ensemble(given, device="cpu")
    read_state(given)
