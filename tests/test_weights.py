from __future__ import annotations

import hashlib
import http.server
import logging
import os
import pickle
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from wsi_engine.encoders import create_encoder, hub
from wsi_engine.encoders import weights as weights_module
from wsi_engine.encoders.cards import find_card
from wsi_engine.encoders.weights import digest_state, fit_state, load_backbone, parse_seed, read_state
from wsi_engine.errors import WeightsError

FILE = Path("given.pt")


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def resnet50() -> torch.nn.Module:
    """A whole ResNet50 of timm, classifier included, with statistics that are not the initial ones."""
    torch.manual_seed(11)
    network = timm.create_model("resnet50", pretrained=False).eval()
    for name, tensor in network.state_dict().items():
        if name.endswith("running_mean"):
            tensor.copy_(torch.randn_like(tensor) * 0.1)
    return network


def expected() -> dict[str, Tensor]:
    return {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2), "n.num_batches_tracked": torch.tensor(0)}


# --- reading files -------------------------------------------------------------------------------------------


def test_both_kinds_of_file_give_the_same_digest_and_features(
    tmp_path: Path, resnet50: torch.nn.Module, tiles: np.ndarray
) -> None:
    state = resnet50.state_dict()
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "w.pt"
    )
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")

    pickled = create_encoder("resnet50", weights=str(tmp_path / "w.pt"), device="cpu", precision="fp32")
    plain = create_encoder("resnet50", weights=str(tmp_path / "w.safetensors"), device="cpu", precision="fp32")

    assert pickled.card.weights_digest == plain.card.weights_digest
    assert (pickled.card.weights, plain.card.weights) == ("file:w.pt", "file:w.safetensors")
    mean, std = torch.tensor(plain.card.mean).view(3, 1, 1), torch.tensor(plain.card.std).view(3, 1, 1)
    x = (torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        for stage in ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3"):
            x = getattr(resnet50, stage)(x)
    np.testing.assert_allclose(plain.encode(tiles), x.mean((2, 3)).numpy(), atol=1e-5)
    assert np.array_equal(pickled.encode(tiles), plain.encode(tiles))


def test_half_precision_files_are_computed_with_in_single(tmp_path: Path) -> None:
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0)
    torch.save(network.half().state_dict(), tmp_path / "half.pth")
    card = find_card("vit_tiny_patch16_224")
    assert card is not None
    backbone, origin = load_backbone(card, str(tmp_path / "half.pth"))
    assert origin == "file:half.pth"
    assert {tensor.dtype for tensor in backbone.state_dict().values()} == {torch.float32}
    assert torch.equal(backbone.network.state_dict()["norm.weight"], network.state_dict()["norm.weight"].float())


class _Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_code_in_a_pickle_is_refused_and_never_runs(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": _Payload(trap)}, protocol=2))
    torch.save({"a": torch.zeros(2), "b": _Payload(trap)}, tmp_path / "zipped.pt")
    for name in ("plain.pt", "zipped.pt"):
        with pytest.raises(WeightsError, match=rf"{name}.*could run code"):
            read_state(tmp_path / name)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pt", "empty.pt", "empty.safetensors"])
def test_damaged_files_get_one_sentence(tmp_path: Path, name: str) -> None:
    whole = tmp_path / f"whole{Path(name).suffix}"
    state = {"a": torch.arange(1000.0)}
    (safetensors.torch.save_file if name.endswith("safetensors") else torch.save)(state, whole)
    content = whole.read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2] if name.startswith("cut") else b"")
    with pytest.raises(WeightsError) as caught:
        read_state(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_weights_get_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "weights.h5").write_bytes(b"x")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    for name, words in {
        "absent.pt": "no file of weights",
        "weights.h5": r"ending \.h5",
        "none.pt": "holds no tensors",
        "list.pt": "holds no tensors",
        ".": "no file of weights",
    }.items():
        with pytest.raises(WeightsError, match=words):
            read_state(tmp_path / name)


@pytest.mark.parametrize("keys", [("state_dict",), ("model",), ("teacher",), ("model", "state_dict"), ()])
def test_nested_state_dicts_are_found(tmp_path: Path, keys: tuple[str, ...]) -> None:
    content: object = {"a": torch.ones(2), "step": 5}
    for key in keys:
        content = {key: content, "epoch": 1}
    torch.save(content, tmp_path / "nested.pt")
    assert list(read_state(tmp_path / "nested.pt")) == ["a"]


# --- fitting names and shapes --------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "backbone.", "encoder.", "module.backbone."])
def test_prefixes_and_classifiers_are_taken_off(prefix: str) -> None:
    outer = prefix.split(".", maxsplit=1)[0] + "." if prefix else ""
    given = {
        f"{prefix}a.weight": torch.ones(2, 3, dtype=torch.float64),
        f"{prefix}a.bias": torch.ones(2),
        f"{prefix}fc.weight": torch.ones(9),
        f"{outer}head.weight": torch.ones(9),
        f"{prefix}layer4.0.conv1.weight": torch.ones(9),
    }
    fitted = fit_state(given, expected(), FILE)
    assert sorted(fitted) == ["a.bias", "a.weight"]
    assert {value.dtype for value in fitted.values()} == {torch.float32}


def test_a_prefix_that_only_some_names_have_stays() -> None:
    given = {"module.a.weight": torch.ones(2, 3), "other.a.bias": torch.ones(2)}
    with pytest.raises(WeightsError, match=r"lacks 2 of the 3"):
        fit_state(given, expected(), FILE)


def test_a_head_that_the_network_has_is_kept() -> None:
    network = {"head.norm.weight": torch.zeros(4)}
    given = {"head.norm.weight": torch.ones(4), "head.fc.weight": torch.ones(9)}
    assert list(fit_state(given, network, FILE)) == ["head.norm.weight"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a.weight": torch.ones(3, 2)}, r"given\.pt holds weights of the wrong shape: a\.weight is 3×2 .* needs 2×3"),
        ({"a.bias": None}, r"given\.pt lacks 1 of the 3 tensors the encoder needs, the first is a\.bias"),
        ({"extra.weight": torch.ones(1)}, r"given\.pt holds 1 tensors .* the first is extra\.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: dict[str, Tensor | None], words: str) -> None:
    given = {"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2), **change}
    with pytest.raises(WeightsError, match=words):
        fit_state({name: value for name, value in given.items() if value is not None}, expected(), FILE)


def test_another_networks_file_is_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet18", pretrained=False).state_dict(), tmp_path / "resnet18.pt")
    with pytest.raises(WeightsError, match=r"wrong shape: layer1\.0\.conv1\.weight is 64×64×3×3 .* needs 64×64×1×1"):
        create_encoder("resnet50", weights=str(tmp_path / "resnet18.pt"), device="cpu", precision="fp32")


# --- digest --------------------------------------------------------------------------------------------------


def test_digest_is_the_hash_of_names_types_shapes_and_bytes() -> None:
    state = {
        "b": torch.tensor(3, dtype=torch.int16),
        "a": torch.tensor([[1.5, -2.0]]),
        "num_batches_tracked": torch.ones(1),
    }
    by_hand = hashlib.sha256()
    by_hand.update(b"a\0float32\0(1, 2)\0" + np.array([1.5, -2.0], "<f4").tobytes())
    by_hand.update(b"b\0int16\0()\0" + np.array(3, "<i2").tobytes())
    assert digest_state(state) == by_hand.hexdigest()


def test_digest_sees_values_not_storage() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    same = [{"a": base}, {"a": base.t().contiguous().t()}, {"a": torch.arange(24.0)[:12].reshape(3, 4)}]
    other = [{"b": base}, {"a": base.reshape(4, 3)}, {"a": base.double()}, {"a": base + 1}, {"a": base.bfloat16()}]
    digests = [digest_state(state) for state in [*same, *other]]
    assert len(set(digests[:3])) == 1
    assert len(set(digests[2:])) == 6


# --- random --------------------------------------------------------------------------------------------------


def test_random_weights_are_said_loudly(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="wsi_engine"):
        encoder = create_encoder("vit_tiny_patch16_224", weights="random:5", device="cpu", precision="fp32")
    assert encoder.card.weights == "random:5"
    assert "RANDOM" in caplog.text


@pytest.mark.parametrize("text", ["random:", "random:x", "random:-1", "random:1.5", "random:٣", f"random:{2**63}"])
def test_a_seed_is_a_whole_number(text: str) -> None:
    with pytest.raises(WeightsError, match="random:0"):
        parse_seed(text)


# --- the hub -------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_find_cached", lambda repository: None)
    monkeypatch.setattr(hub, "hub_answers", lambda: False)


@pytest.mark.parametrize("name", ["resnet50", "uni2-h", "timm:resnet18"])
@pytest.mark.usefixtures("offline")
def test_offline_without_weights_names_the_ways_out(name: str) -> None:
    with pytest.raises(WeightsError) as caught:
        create_encoder(name, device="cpu", precision="fp32")
    text = str(caught.value)
    for words in (name, "go online", "--weights FILE", "--weights random:0", "--encoder texture"):
        assert words in text
    assert ("accept the licence" in text and "hf auth login" in text) is (name == "uni2-h")
    assert "\n" not in text


def test_published_weights_are_loaded_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resnet50: torch.nn.Module
) -> None:
    safetensors.torch.save_file(resnet50.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(weights_module, "fetch_weights", lambda card: tmp_path / "model.safetensors")
    card = create_encoder("resnet50", device="cpu", precision="fp32").card
    assert card.weights == "hub:timm/resnet50.tv_in1k"
    cut = {name: value for name, value in resnet50.state_dict().items() if not name.startswith(("fc.", "layer4."))}
    assert card.weights_digest == digest_state(cut)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_timms_published_files_and_computed_buffers_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    torch.manual_seed(1)
    network = timm.create_model(name, pretrained=False).eval()  # eva02 computes its positions, no file holds them
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(weights_module, "fetch_weights", lambda card: tmp_path / "model.safetensors")
    network.reset_classifier(0)
    tiles = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    encoder = create_encoder(f"timm:{name}", device="cpu", precision="fp32")
    mean, std = torch.tensor(encoder.card.mean).view(3, 1, 1), torch.tensor(encoder.card.std).view(3, 1, 1)
    with torch.no_grad():
        expected = network((torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - mean) / std)
    np.testing.assert_allclose(encoder.encode(tiles), expected, atol=1e-5)


def test_cached_weights_are_found_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    card = find_card("resnet50")
    assert card is not None
    folder = tmp_path / "models--timm--resnet50.tv_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "pytorch_model.bin").write_bytes(b"x")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "hub_answers", lambda: pytest.fail("asked the network"))
    assert hub.fetch_weights(card) == folder / "snapshots" / "abc" / "pytorch_model.bin"


class _Refusing(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(403)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Refusing) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_the_probe_tells_a_hub_that_answers(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert hub.hub_answers()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.hub_answers()


def test_the_probe_gives_up_on_a_hub_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert not hub.hub_answers(timeout=0.2)
    assert not hub.hub_answers(timeout=5)  # and now the port is closed
