"""Heads on disk: our own files, the layouts that others publish, and what cannot be read."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wsi_engine.models import CheckpointError, Head, HeadError, create_head, load_head, read_head_card, save_head
from wsi_engine.models.heads.checkpoints import CARD_KEY

State = dict[str, Tensor]
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("clam_sb", {"size": "big", "gated": False, "subtyping": True, "k": 3, "dropout": 0.1}),
    ("clam_mb", {"size": (24, 12)}),
    ("abmil", {"gated": False, "hidden": (32, 16), "attention": 8}),
    ("dsmil", {"nonlinear": False, "passing_v": True, "query": 16}),
    ("dsmil", {}),
    ("transmil", {"dim": 32, "heads": 4}),
    ("mean", {"hidden": (8,)}),
)
PUBLISHED = (
    ("clam_sb", {"size": "small"}),
    ("clam_sb", {"size": "big", "gated": False}),
    ("clam_mb", {"size": "small"}),
    ("clam_mb", {"size": (24, 12), "gated": False}),
    ("dsmil", {}),
    ("dsmil", {"nonlinear": False, "passing_v": True, "query": 16}),
    ("transmil", {"dim": 32, "heads": 4}),
)


def build(name: str, options: dict[str, Any], in_dim: int = 12, n_classes: int = 3) -> Head:
    torch.manual_seed(11)
    return create_head(name, in_dim, n_classes, **options).eval()


def features(dim: int = 12) -> Tensor:
    return torch.randn(9, dim, generator=torch.Generator().manual_seed(4))


def same(one: Head, two: Head) -> bool:
    a, b = one(features(one.in_dim)), two(features(two.in_dim))
    return torch.equal(a.logits, b.logits) and torch.equal(a.attention, b.attention)


# our own files


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_head_comes_back_as_it_was(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    head, path = build(name, options), tmp_path / "head.safetensors"
    save_head(head, path, {"encoder": {"name": "uni", "dim": 12}, "classes": ["a", "b", "ç"]})
    again = load_head(path)
    assert (type(again), again.in_dim, again.n_classes) == (type(head), 12, 3)
    assert again.settings == head.settings
    assert not again.training
    assert same(head, again)
    card = read_head_card(path)
    assert card["classes"] == ["a", "b", "ç"]
    assert (card["name"], card["in_dim"], card["encoder"]["name"]) == (name, 12, "uni")
    assert [file.name for file in tmp_path.iterdir()] == ["head.safetensors"]


def test_loading_draws_no_random_numbers_and_leaves_the_head_trainable(tmp_path: Path) -> None:
    save_head(build("clam_sb", {}), tmp_path / "head")  # the ending does not matter
    before = torch.get_rng_state()
    head = load_head(tmp_path / "head").train()
    assert torch.equal(before, torch.get_rng_state())
    head.loss(head(features()), 0).backward()
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in head.parameters())


def test_saving_replaces_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "head.safetensors"
    save_head(build("mean", {}), path)
    before = path.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("wsi_engine.models.heads.checkpoints.os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_head(build("abmil", {}), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_cards_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    head, path = build("mean", {}), tmp_path / "head.safetensors"
    with pytest.raises(HeadError, match="gives in_dim as 13"):
        save_head(head, path, {"in_dim": 13})
    with pytest.raises(HeadError, match="JSON"):
        save_head(head, path, {"when": object()})
    with pytest.raises(HeadError, match="JSON"):
        save_head(head, path, {"loss": float("nan")})
    assert not path.exists()
    save_head(head, path, {"in_dim": 12})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": 99}, "version 99"),
        ({"name": "clam_xx"}, "no head named 'clam_xx'"),
        ({"name": 7}, "lacks one of"),
        ({"n_classes": "two"}, "cannot be built"),
        ({"options": {"colour": 1}}, "no option 'colour'"),
        ({"options": {"name": 1}}, "cannot be built"),
        ({"options": []}, "lacks one of"),
        ({"in_dim": 13}, r"shape \(3, 12\) where its other tensors ask for \(3, 13\)"),
        ({"name": "abmil"}, "lacks"),
    ],
)
def test_damaged_cards_are_refused(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    path = tmp_path / "head.safetensors"
    head = build("mean", {})
    save_head(head, path)
    card = read_head_card(path) | change
    save_file(head.state_dict(), path, metadata={CARD_KEY: json.dumps(card)})
    with pytest.raises(CheckpointError, match=match):
        load_head(path)


def test_files_without_a_card_say_so(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save_file(build("clam_sb", {}).state_dict(), path)
    with pytest.raises(CheckpointError, match="no card"):
        read_head_card(path)
    assert load_head(path).name == "clam_sb"  # known by its tensors all the same
    save_file(build("mean", {}).state_dict(), path, metadata={CARD_KEY: "{"})
    with pytest.raises(CheckpointError, match="not JSON"):
        load_head(path)


# state dicts of others


def data_parallel(state: State) -> State:
    return {f"module.{name}": value for name, value in state.items()}


def parallel_inside(state: State) -> State:
    """CLAM wraps its attention network alone: attention_net.module.0.weight."""
    return {name.replace("attention_net.", "attention_net.module."): value for name, value in state.items()}


def with_marks_removed(state: State) -> State:
    """As scripts that take every .module away leave it, the real one of plain attention too."""
    return {name.replace(".module", ""): value for name, value in state.items()}


def lightning(state: State) -> State:
    return {f"model.{name}": value for name, value in state.items()} | {"loss.weight": torch.ones(2)}


def old_index(state: State) -> State:
    """Without dropout CLAM's attention stood at 2, and the last layer of a plain one at 2 in it."""
    old = {}
    for name, value in state.items():
        old[name.replace("module.3.", "module.2.").replace("attention_net.3.", "attention_net.2.")] = value
    return old


def with_buffers(state: State) -> State:
    return state | {"instance_loss_fn.labels": torch.arange(2)}


WRAPPERS = (dict, data_parallel, parallel_inside, with_marks_removed, lightning, old_index, with_buffers)


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize(("name", "options"), PUBLISHED)
def test_published_layouts_are_told_by_their_tensors(
    tmp_path: Path, name: str, options: dict[str, Any], wrap: Callable[[State], State]
) -> None:
    head, path = build(name, options), tmp_path / "checkpoint.pt"
    torch.save(wrap(head.state_dict()), path)
    again = load_head(path)
    assert (again.name, again.in_dim, again.n_classes) == (name, 12, 3)
    assert again.settings == head.settings
    assert same(head, again)


def test_old_index_under_data_parallel() -> None:
    head = build("clam_sb", {"gated": False})
    assert same(head, load_head(data_parallel(parallel_inside(old_index(head.state_dict())))))


def test_nests_halves_and_legacy_files_are_read(tmp_path: Path) -> None:
    head, path = build("transmil", {"dim": 32, "heads": 4}), tmp_path / "epoch.ckpt"
    torch.save({"epoch": 3, "state_dict": lightning(head.state_dict())}, path)
    assert same(head, load_head(path))
    torch.save(head.state_dict(), path, _use_new_zipfile_serialization=False)
    assert same(head, load_head(str(path)))
    half = load_head({name: value.half() for name, value in head.state_dict().items()})
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())


def test_dsmil_with_its_encoder_gives_the_head_alone() -> None:
    head = build("dsmil", {})
    state = {name.replace("fc.0.", "fc."): value for name, value in head.state_dict().items()}
    state["i_classifier.feature_extractor.conv1.weight"] = torch.zeros(4, 3, 7, 7)
    assert same(head, load_head(state))


def test_a_state_dict_is_not_tied_to_the_head() -> None:
    state = build("clam_sb", {}).state_dict()
    head = load_head(state)
    state["classifiers.weight"].zero_()
    assert float(head.state_dict()["classifiers.weight"].detach().abs().sum()) > 0


def test_options_that_tensors_do_not_tell(tmp_path: Path) -> None:
    head, path = build("clam_sb", {}), tmp_path / "head.safetensors"
    assert load_head(head.state_dict(), k=4, subtyping=True).options["k"] == 4
    save_head(head, path)
    assert load_head(path, dropout=0.5).options["dropout"] == 0.5
    with pytest.raises(HeadError, match="no option 'colour'"):
        load_head(path, colour=1)


# what cannot be read


def clam(**changes: Any) -> dict[str, Any]:
    return build("clam_sb", {}).state_dict() | {name.replace("__", "."): value for name, value in changes.items()}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "holds a list"),
        (torch.zeros(3), "holds a Tensor"),
        ({}, "an empty mapping"),
        ({"state_dict": {}}, "an empty mapping"),
        ({"fc.weight": torch.zeros(2, 2)}, "layout of no head known here .its first tensor is fc.weight"),
        (clam(epoch=3), "holds a int under 'epoch'"),
        (clam(classifiers__weight=[[1.0]]), "holds a list under 'classifiers.weight'"),
        (clam(classifiers__weight=torch.zeros(3)), "with 1 axes where the layout has 2"),
        (clam(classifiers__weight=torch.zeros(3, 12)), r"shape \(3, 12\) where its other tensors ask for \(3, 512\)"),
        (clam(classifiers__weight=torch.full((3, 512), float("nan"))), "NaN or infinite"),
        (clam(classifiers__weight=torch.zeros(3, 512, dtype=torch.int64)), "int64"),
        (clam(classifiers__weight=torch.zeros(3, 512).to_sparse()), "sparse"),
        (clam(classifiers__weight=torch.zeros(4, 512)), "lacks 2 of"),
        (clam(classifiers__weight=torch.zeros(1, 512)), "cannot be built"),
        (clam(extra=torch.zeros(1)), "no place for, the first is extra"),
        (clam(module__classifiers__weight=torch.zeros(3, 512)), "classifiers.weight twice"),
        ({"attention_net.0.weight": torch.zeros(512, 12)}, "lacks the tensor attention_net.3"),
        (
            {f"{fold}.{name}": value for fold in "ab" for name, value in clam().items()},
            "more than one head",
        ),
    ],
)
def test_what_is_no_head_is_refused(tmp_path: Path, content: Any, match: str) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_head(path)
    assert str(path) in str(caught.value)
    assert not str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_missing_and_cut_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no file of a head"):
        load_head(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="no file of a head"):
        load_head(tmp_path)
    head = build("clam_sb", {"size": (8, 4)})
    save_head(head, tmp_path / "whole.safetensors")
    torch.save(head.state_dict(), tmp_path / "whole.pt")
    for whole in (tmp_path / "whole.safetensors", tmp_path / "whole.pt"):
        content = whole.read_bytes()
        for length in (0, 3, 100, len(content) // 2, len(content) - 5):
            cut = tmp_path / f"cut{whole.suffix}"
            cut.write_bytes(content[:length])
            with pytest.raises(CheckpointError) as caught:
                load_head(cut)
            assert "cut" in str(caught.value)
    with pytest.raises(CheckpointError, match="safetensors"):
        read_head_card(tmp_path / "whole.pt")


def test_pickled_code_does_not_run(tmp_path: Path) -> None:
    target = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (target,))

    plain, zipped, module = (tmp_path / name for name in ("plain.pt", "zipped.pt", "module.pt"))
    plain.write_bytes(pickle.dumps({"state_dict": Trap()}))
    torch.save({"state_dict": Trap()}, zipped)
    torch.save(torch.nn.Linear(2, 2), module)
    for path in (plain, zipped, module):
        with pytest.raises(CheckpointError, match="refused because they could run code"):
            load_head(path)
    assert not target.exists()
