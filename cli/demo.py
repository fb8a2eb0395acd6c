"""``wsi demo``: the main job end to end, on a slide that the engine draws or on the user's own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wsi_engine.cli import console

if TYPE_CHECKING:
    from wsi_engine.extraction import ExtractReport

SIDE = 8192
"""Side of the drawn slide in pixels."""


def demo(
    slide: Annotated[
        str | None, typer.Argument(help="A slide of your own; else one is drawn.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for what the demo makes.")] = Path("demo"),
    slide_mpp: Annotated[
        float | None,
        typer.Option(help="Micrometres per level-0 pixel, where the header has none.", show_default=False),
    ] = None,
) -> None:
    """Do the main job end to end: info, features, a picture, a cohort trained and classified, nuclei."""
    from wsi_engine.cli.demo_cohort import demo_cohort  # noqa: PLC0415
    from wsi_engine.cli.demo_nuclei import demo_nuclei  # noqa: PLC0415
    from wsi_engine.cli.info import info  # noqa: PLC0415
    from wsi_engine.store import FeatureStore  # noqa: PLC0415

    start = time.monotonic()
    path = slide or str(_draw_slide(out))
    _say("What it is (wsi info)")
    info(path, slide_mpp, "auto", as_json=False)
    _say("Features by the built-in encoder (wsi extract --encoder texture)")
    features = out / "features"
    _extract(path, features, "texture", None, slide_mpp)
    _say("Features by ResNet50 (wsi extract --encoder resnet50)")
    report = _extract_resnet(path, features, slide_mpp)
    store = report.results[0].store
    picture = _draw_picture(path, store, out, slide_mpp)
    _say("What there is now")
    _print_store(store)
    console.out.print(f"picture: {picture}", markup=False)
    demo_cohort(out)
    _say("Every nucleus of a field of the slide (wsi nuclei)")
    demo_nuclei(path, out, slide_mpp, FeatureStore.open(store).tissue())
    _print_next(path, out, store, time.monotonic() - start)


def _say(heading: str) -> None:
    console.out.print(f"\n[bold]{heading}[/]")


def _draw_slide(out: Path) -> Path:
    """A synthetic H&E slide of :data:`SIDE` pixels, unless an earlier demo drew it."""
    from wsi_engine.synthetic import SlideSpec, write_slide  # noqa: PLC0415

    path = out / "synthetic.svs"
    if not path.exists():
        _say(f"Drawing a slide of {SIDE} × {SIDE} pixels with known truth")
        out.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        write_slide(path, SlideSpec(width=SIDE, height=SIDE, mpp=0.25, seed=1))
        console.out.print(f"{path}: {path.stat().st_size / 1e6:.0f} MB in {time.monotonic() - start:.0f} s")
    return path


def _extract(path: str, out: Path, encoder: str, weights: str | None, slide_mpp: float | None) -> ExtractReport:
    from wsi_engine.cli.progress import RunDisplay  # noqa: PLC0415
    from wsi_engine.extraction import extract  # noqa: PLC0415

    with RunDisplay(console.err) as display:
        report = extract(path, out, encoder, weights, slide_mpp=slide_mpp, progress=display)
    if report.failed:
        raise typer.Exit(console.EXIT_FAILED)
    return report


def _extract_resnet(path: str, out: Path, slide_mpp: float | None) -> ExtractReport:
    """ResNet50 with its published weights; with random ones, and said so, where the hub cannot be reached."""
    from wsi_engine.errors import WeightsError  # noqa: PLC0415

    try:
        return _extract(path, out, "resnet50", None, slide_mpp)
    except WeightsError:
        console.err.print(
            "[yellow]The published weights cannot be fetched here, so ResNet50 runs with random ones (random:0): "
            "the features show speed and layout and mean nothing.[/]"
        )
        return _extract(path, out, "resnet50", "random:0", slide_mpp)


def _draw_picture(path: str, store: str, out: Path, slide_mpp: float | None) -> Path:
    from wsi_engine.picture import draw_overview, save_picture  # noqa: PLC0415
    from wsi_engine.slide import open_slide  # noqa: PLC0415
    from wsi_engine.store import FeatureStore  # noqa: PLC0415

    opened = FeatureStore.open(store)
    picture = out / f"{Path(store).stem}.png"
    with open_slide(path, slide_mpp) as slide:
        save_picture(draw_overview(slide, opened.grid(), opened.tissue()), picture)
    return picture


def _print_store(store: str) -> None:
    from wsi_engine.store import FeatureStore  # noqa: PLC0415

    opened: Any = FeatureStore.open(store)
    console.out.print(f"store: {store}", markup=False)
    for encoder in opened.encoders():
        features = opened.features(encoder)
        weights = opened.provenance(encoder)["encoder"]["weights"]
        console.out.print(f"  {encoder}: {features.shape[0]} × {features.shape[1]} {features.dtype} ({weights})")


def _print_next(path: str, out: Path, store: str, seconds: float) -> None:
    """Commands to try next, ready to paste."""
    from wsi_engine.cli.demo_cohort import next_commands  # noqa: PLC0415

    console.out.print(f"done in {seconds:.0f} s")
    _say("Next")
    for line in (
        "wsi encoders",
        f"wsi extract YOUR_SLIDES/ -o {out}/yours --encoder texture",
        f"wsi extract {path} -o {out}/features --encoder uni --weights uni.safetensors",
        f"wsi nuclei {path} -o {out}/all-nuclei",
        f"wsi export trident {store} -o {out}/trident --encoder texture",
        *next_commands(out),
        f'python -c "import wsi_engine as we; print(we.FeatureStore.open({store!r}).features({"texture"!r}).shape)"',
    ):
        console.out.print(f"  {line}", markup=False)
