"""Image classification, after chapter 5 of "Deep Learning for Coders": from picture files to a fine-tuned ResNet.

fastai does everything but step the parameters: presizing, the learning rate finder, fine-tuning, one learning rate per
layer group, the most confused classes, mixed precision. All of it with ``opt_func=fusedopt.Adam``. The pictures are
drawn on the spot and the weights start at random, so nothing is downloaded.

    python examples/book_ch05_breeds.py --images 60 --epochs 8
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.vision.all import (
    Callback,
    CategoryBlock,
    ClassificationInterpretation,
    DataBlock,
    DataLoaders,
    ImageBlock,
    Learner,
    RandomSplitter,
    RegexLabeller,
    Resize,
    accuracy,
    aug_transforms,
    get_image_files,
    resnet18,
    set_seed,
    using_attr,
    vision_learner,
)
from PIL import Image, ImageDraw

import fusedopt

# ------------------------------------------------------------------------------------------------------------
# Pictures of six breeds: three forms, each with a plain or a ringed coat

FORMS = {"disc": (15, 1.0), "star": (5, 0.42), "triangle": (3, 0.5)}
"""Corners, and how far the outline comes in between two of them."""
COATS = ("plain", "ringed")


def outline(form: str, centre: tuple[float, float], radius: float, turn: float) -> list[tuple[float, float]]:
    """The points of a form: its corners and, half-way between two of them, the points further in."""
    corners, inner = FORMS[form]
    points = []
    for i in range(2 * corners):
        angle, r = turn + i * math.pi / corners, radius * (inner if i % 2 else 1)
        points.append((centre[0] + r * math.sin(angle), centre[1] - r * math.cos(angle)))
    return points


def portrait(form: str, coat: str, rng: random.Random) -> Image.Image:
    """One animal, somewhere in a blurred landscape, in any colours."""
    width, height = rng.randint(90, 140), rng.randint(90, 140)
    ground = bytes(rng.randint(60, 150) for _ in range(5 * 5 * 3))
    image = Image.frombytes("RGB", (5, 5), ground).resize((width, height), Image.Resampling.BICUBIC)
    radius = rng.uniform(0.26, 0.4) * min(width, height)
    centre = width * rng.uniform(0.42, 0.58), height * rng.uniform(0.42, 0.58)
    turn = rng.uniform(-0.4, 0.4)
    light, dark = (tuple(rng.randint(low, low + 75) for _ in range(3)) for low in (180, 0))
    draw = ImageDraw.Draw(image)
    draw.polygon(outline(form, centre, radius, turn), fill=light)
    if coat == "ringed":
        draw.polygon(outline(form, centre, 0.6 * radius, turn), fill=dark)
        draw.polygon(outline(form, centre, 0.35 * radius, turn), fill=light)
    return image


def draw_breeds(folder: Path, images: int) -> None:
    """Write so many pictures of each breed, as ``plain_disc_0.jpg`` and so on."""
    rng = random.Random(5)
    for form in FORMS:
        for coat in COATS:
            for i in range(images):
                portrait(form, coat, rng).save(folder / f"{coat}_{form}_{i}.jpg")


# ------------------------------------------------------------------------------------------------------------
# Training


def load_breeds(folder: Path, size: int, bs: int) -> DataLoaders:
    """Presizing: crop each picture to half as much again as is needed, then augment and shrink whole batches."""
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock),
        get_items=get_image_files,
        splitter=RandomSplitter(valid_pct=0.25, seed=5),
        get_y=using_attr(RegexLabeller(r"(.+)_\d+\.jpg$"), "name"),
        item_tfms=Resize(3 * size // 2),
        batch_tfms=aug_transforms(size=size, min_scale=0.75),
    )
    return block.dataloaders(folder, path=folder, bs=bs, num_workers=0)


class CPUMixedPrecision(MixedPrecision):
    """Mixed precision on CPUs, in bfloat16. fastai's own asks for a GPU's, and does nothing without one."""

    def before_fit(self) -> None:
        self.autocast = torch.autocast("cpu", dtype=torch.bfloat16)
        self.learn.scaler = torch.amp.GradScaler("cpu", enabled=False)  # bfloat16 reaches as far as float32
        self.scales: list[float] = []


def to_fp16(learn: Learner) -> Learner:
    """As ``learn.to_fp16()``, but on a CPU too."""
    return learn.to_fp16() if learn.dls.device.type == "cuda" else learn.add_cb(CPUMixedPrecision())


@dataclass(frozen=True)
class Phase:
    """What one call of a fit method did."""

    name: str
    losses: list[float]
    """One per batch, as the Recorder smooths them."""
    peak_lr: float
    """The highest learning rate of the last layer group."""
    valid_loss: float
    accuracy: float
    seconds: float


def phase(name: str, learn: Learner, fit: Callable[[], None]) -> Phase:
    """Call `fit`, and look into the Recorder. (Of fine_tune it has what came after unfreezing.)"""
    print(f"-- {name}")
    start = time.perf_counter()
    fit()
    _, valid_loss, right = learn.recorder.values[-1]
    seconds = time.perf_counter() - start
    return Phase(
        name, [float(x) for x in learn.recorder.losses], max(learn.recorder.lrs), valid_loss, right, seconds
    )


class PeakRates(Callback):
    """The highest learning rate that each layer group was stepped with."""

    def before_fit(self) -> None:
        self.lrs = [0.0 for _ in self.opt.hypers]

    def before_step(self) -> None:
        self.lrs = [max(lr, hyper["lr"]) for lr, hyper in zip(self.lrs, self.opt.hypers, strict=True)]


class PredictionType(Callback):
    """The dtype that the model answers in."""

    order = MixedPrecision.order - 1  # which turns it into float32

    def after_pred(self) -> None:
        self.dtype = self.pred.dtype


@dataclass(frozen=True)
class Found:
    """What `main` returns."""

    breeds: list[str]
    suggested_lr: float
    finder_losses: list[float]
    phases: list[Phase]
    group_lrs: list[float]
    """What each layer group was trained with, at most, in the phase of discriminative learning rates."""
    confused: list[tuple[str, str, int]]
    """Actual breed, predicted breed, how often."""
    half: torch.dtype
    """What the model answered in during the mixed-precision phase."""


def new_learner(dls: DataLoaders, opt_func: Callable = fusedopt.Adam) -> Learner:
    """A ResNet that has learnt nothing yet."""
    return vision_learner(dls, resnet18, pretrained=False, opt_func=opt_func, metrics=accuracy, ps=0.1)


def main(
    images: int = 60,
    epochs: int = 8,
    size: int = 40,
    bs: int = 16,
    finder_steps: int = 60,
    lr: float | None = None,
) -> Found:
    """Draw so many pictures per breed, train on three quarters of them, and say what became of the rest.

    `lr`, if given, is used in place of the one that the learning rate finder suggests.
    """
    set_seed(5)
    with tempfile.TemporaryDirectory() as name:
        draw_breeds(Path(name), images)
        dls = load_breeds(Path(name), size, bs)
        learn = new_learner(dls)
        with learn.no_bar():
            suggested = learn.lr_find(num_it=finder_steps, show_plot=False).valley
            finder_losses = [float(loss) for loss in learn.recorder.losses]
            print(f"{len(dls.train_ds)} pictures of {len(dls.vocab)} breeds; suggested: {suggested:.1e}")
            lr = suggested if lr is None else lr

            # By default the first layers would learn a hundred times slower than the last: for pretrained ones.
            tuned = phase("fine_tune", learn, lambda: learn.fine_tune(epochs, base_lr=lr, lr_mult=2))

            peak, spread = PeakRates(), slice(1e-6, 1e-4)
            spread_out = phase(
                "one learning rate per layer group",
                learn,
                lambda: learn.fit_one_cycle(1, lr_max=spread, cbs=peak),
            )
            confused = ClassificationInterpretation.from_learner(learn).most_confused(min_val=2)

            answers = PredictionType()
            to_fp16(learn)
            half = phase("mixed precision", learn, lambda: learn.fit_one_cycle(1, lr / 10, cbs=answers))

    print("highest learning rates of the layer groups:", ", ".join(f"{rate:.1e}" for rate in peak.lrs))
    print("most confused:", "; ".join(f"{a} taken for {b}, {n} times" for a, b, n in confused) or "nothing")
    for done in (tuned, spread_out, half):
        print(f"{done.name:36}{100 * done.accuracy:6.1f} % right after {done.seconds:5.1f} s")
    return Found(
        breeds=list(dls.vocab),
        suggested_lr=suggested,
        finder_losses=finder_losses,
        phases=[tuned, spread_out, half],
        group_lrs=peak.lrs,
        confused=[(a, b, int(n)) for a, b, n in confused],
        half=answers.dtype,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=60, help="pictures per breed")
    parser.add_argument("--epochs", type=int, default=8, help="after unfreezing")
    args = parser.parse_args()
    main(args.images, args.epochs)
