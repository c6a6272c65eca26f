"""Pictures to crops at MolmoE-1B's geometry on one CPU core, exact and fast, as JSON.

Times start from decoded pixels; decoding has rows of its own. The pixel error is between fast and exact crops in
levels of 255; the accuracy effect is the pocket's on validation questions of the test bed at the native setting.

    python benchmarks/preprocess.py --json benchmarks/results/preprocess.json
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TEMPOVLM_THREADS"] = "1"

import numpy as np
import torch
from PIL import Image

from output import write_json
from tempovlm import api
from tempovlm.core.units import now_ms
from tempovlm.data.catalog import load_samples
from tempovlm.data.registry import GENERATED
from tempovlm.data.scoring import score
from tempovlm.model.config import CLIP_STD, MOLMOE_1B
from tempovlm.model.vision.image import open_image
from tempovlm.model.vision.tiling import cut_crops
from tempovlm.testbed.generate import make_scene

SIZES = ((640, 480), (1920, 1080), (4032, 3024))


def timed(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median and spread of a call after two warm ones."""
    times_ms = []
    for i in range(repeats + 2):
        begin_ms = now_ms()
        run()
        if i > 1:
            times_ms.append(now_ms() - begin_ms)
    low, high = np.quantile(times_ms, (0.1, 0.9))
    return {"ms_median": statistics.median(times_ms), "ms_p10": float(low), "ms_p90": float(high)}


def picture(width: int, height: int) -> Image.Image:
    """A generated scene, enlarged, with noise, so that it has edges and does not compress to nothing."""
    scene = Image.fromarray(make_scene("text_vqa", "val", 0, size=(336, 448)).image)
    pixels = np.asarray(scene.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noise = np.random.default_rng(0).integers(-6, 7, pixels.shape, dtype=np.int16)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


def speed(repeats: int) -> list[dict[str, Any]]:
    """Return a row for each size and step."""
    rows = []
    for width, height in SIZES:
        image = picture(width, height)
        pixels = np.array(image)
        name = f"{width}x{height}"
        for kind, options in (("JPEG", {"quality": 90}), ("PNG", {"compress_level": 6})):
            file = io.BytesIO()
            image.save(file, kind, **options)
            row = timed(partial(open_image, file.getvalue()), min(repeats, 10))
            rows.append({"name": f"decode_{kind.lower()}_{name}", **row})
        for mode in ("exact", "fast"):
            run = partial(cut_crops, pixels, "high", MOLMOE_1B.vision, exact=mode == "exact")
            rows.append({"name": f"{mode}_{name}_high", **timed(run, repeats), "crops": run().grid.num_crops})
    return rows


def pixel_error() -> dict[str, float]:
    """Compare fast with exact crops of the 1920 × 1080 picture, in levels of 255."""
    pixels = np.array(picture(1920, 1080))
    fine, fast = (cut_crops(pixels, "high", MOLMOE_1B.vision, exact=exact).patches for exact in (True, False))
    levels = (fine - fast).abs().view(*fine.shape[:-1], -1, 3) * torch.tensor(CLIP_STD) * 255
    return {"max_levels": round(float(levels.max()), 3), "mean_levels": round(float(levels.mean()), 4)}


def accuracy_effect(count: int) -> dict[str, Any]:
    """Return the pocket's score on the same questions with either mode."""
    samples = [sample for name in GENERATED for sample in load_samples(name, num_samples=count)]
    models = {mode: api.load("pocket", device="cpu", exact=mode == "exact") for mode in ("exact", "fast")}
    answers = {
        mode: [model.answer(s.image_path, s.question, style=s.style).text for s in samples]
        for mode, model in models.items()
    }
    scores = {mode: [score(s, t) for s, t in zip(samples, texts, strict=True)] for mode, texts in answers.items()}
    return {
        "num_samples": len(samples),
        **{f"accuracy_{mode}": round(statistics.mean(values), 4) for mode, values in scores.items()},
        "answers_that_differ": sum(a != b for a, b in zip(answers["exact"], answers["fast"], strict=True)),
        "stamp": models["fast"].stamp("synthetic").to_json(),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--num_samples", type=int, default=50, help="questions of each data set")
    parser.add_argument("--json", type=Path, help="file to write; standard output without it")
    flags = parser.parse_args()
    effect = accuracy_effect(flags.num_samples)
    stamp = effect.pop("stamp")
    record = {"stamp": stamp, "rows": speed(flags.repeats), "fast_pixel_error": pixel_error(), "pocket": effect}
    write_json(record, flags.json)


if __name__ == "__main__":
    main()
