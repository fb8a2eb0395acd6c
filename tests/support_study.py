"""A small study on disk: pictures of tissue, and the CSV that names them with what is known of their patients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from wsi_engine.synthetic import SlideSpec, SyntheticSlide

STUDY = """slide,slide_id,patient,site,mpp,split,grade,age
slides/a.png,a,p1,x,0.25,train,low,50
slides/b.png,b,p1,x,0.25,train,low,50
slides/c.png,c,p2,y,0.25,test,high,
slides/d.png,d,p3,y,0.25,val,high,71
"""


def draw_study(folder: Path) -> Path:
    """``cohort.csv`` beside ``slides/``, four small pictures of tissue of different content; returns the CSV."""
    (folder / "slides").mkdir(parents=True)
    for seed, name in enumerate("abcd"):
        picture = SyntheticSlide(SlideSpec(300, 260, coverage=1, seed=seed)).paint(0, 0, 300, 260)
        Image.fromarray(np.asarray(picture)).save(folder / "slides" / f"{name}.png")
    (folder / "cohort.csv").write_text(STUDY)
    return folder / "cohort.csv"
