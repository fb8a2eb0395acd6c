"""A tiny transformer, tiny slides whose label is written in a few of their tiles, and short runs of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from wsi_engine import create_encoder
from wsi_engine.cohorts.splits import SplitSettings
from wsi_engine.encoders.base import EncoderCard
from wsi_engine.encoders.deep import DeepEncoder
from wsi_engine.encoders.prompted import describe_prompted
from wsi_engine.inputs import SlideSource
from wsi_engine.models.prompt_files import save_prompts
from wsi_engine.slide import open_slide
from wsi_engine.training.hardware import Hardware
from wsi_engine.training.plan import HeadPlan
from wsi_engine.training.prompt_fold import PromptTask, build_tuned
from wsi_engine.training.prompt_run import train_prompt
from wsi_engine.training.prompt_settings import PromptSettings, Tuning
from wsi_engine.training.prompt_tiles import SlideTiles
from wsi_engine.training.report import TrainReport

SIDE, TILE = 96, 32
"""Pixels of a slide and of a tile: nine tiles a slide."""

TINY = EncoderCard(
    "tiny", "timm", "vit_tiny_patch16_224", TILE, 192, "cls", "open", mpp=0.5,
    options=(("img_size", TILE), ("depth", 2)), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
)  # fmt: skip

QUICK = PromptSettings(epochs=3, learning_rate=1e-2, bags_per_step=2, chunk=4, device="cpu", precision="fp32")
SPLITS = SplitSettings(folds=2, validation=0.25)


def make_encoder(card: EncoderCard = TINY, weights: str = "random:3") -> DeepEncoder:
    """Random weights, on the CPU in fp32."""
    return DeepEncoder(card, weights, "cpu", "fp32")


def write_slides(folder: Path, slides: int = 16) -> Path:
    """``cohort.csv`` in a folder beside its slides (PNG, 0.5 µm per pixel by the column ``mpp``); returned.

    Every second slide is of class "high": stripes on two of its tiles run down instead of across.
    """
    rng = np.random.default_rng(8)
    (folder / "slides").mkdir(parents=True)
    lines = ["slide,slide_id,patient,grade,mpp"]
    across = np.where(np.arange(TILE) // 4 % 2, 60, -60)[:, None, None] * np.ones((1, TILE, 1))
    for number in range(slides):
        picture = np.array([200, 120, 160]) + rng.normal(0, 6, (SIDE, SIDE, 3))
        for tile in rng.choice(9, 3, replace=False):
            y, x = divmod(int(tile), 3)
            stripes = across.transpose(1, 0, 2) if number % 2 else across
            picture[y * TILE : (y + 1) * TILE, x * TILE : (x + 1) * TILE] += stripes
        path = folder / "slides" / f"s{number:02}.png"
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(path)
        lines.append(f"slides/{path.name},s{number:02},p{number},{'high' if number % 2 else 'low'},0.5")
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n")
    return folder


def train(cohort: Path, out: Path, **changes: Any) -> TrainReport:
    arguments: dict[str, Any] = {
        "head": "mean", "tissue": None, "splits": SPLITS, "settings": QUICK, "encoder": make_encoder(), "prompts": 2,
    }  # fmt: skip
    return train_prompt(cohort / "cohort.csv", "grade", out, **(arguments | changes))


def slide_tiles(cohort: Path, places: int = 4, share: float = 0.1) -> SlideTiles:
    from wsi_engine.grid import lay_grid

    sources = [SlideSource(str(cohort / "slides" / f"s{n:02}.png"), f"s{n:02}", 0.5) for n in range(places)]
    grids = []
    for source in sources:
        with open_slide(source.path, source.mpp) as slide:
            grids.append(lay_grid(slide, 0.5, TILE, tissue=None))
    return SlideTiles(sources, grids, keep_share=share)


def make_task(cohort: Path, **changes: Any) -> PromptTask:
    task = PromptTask(
        slide_tiles(cohort, 8), np.arange(8) % 2, [f"s{n}" for n in range(8)], make_encoder(), Tuning(prompts=2),
        HeadPlan("abmil", 192, 2, {"hidden": (16,), "attention": 8, "dropout": 0.0}), QUICK,
        Hardware(torch.device("cpu"), make_encoder()._precision, 1),
    )  # fmt: skip
    return replace(task, **changes)


def save_tiny_prompts(path: Path, **card: Any) -> Path:
    """Prompts for timm's smallest transformer with random weights."""
    encoder = create_encoder("timm:test_vit", "random:0", "cpu", "fp32")
    module: Any = build_tuned(encoder, Tuning(prompts=2), 5)  # type: ignore[arg-type]
    name = describe_prompted(encoder.card, module, path.name).name
    save_prompts(module, path, encoder.card.weights_digest, {"encoder": "timm:test_vit", "features": name, **card})
    return path
