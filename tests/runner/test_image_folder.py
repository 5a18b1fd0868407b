"""The shipped recipe for a folder of images: published features, a new head, digits written out as images."""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

import fromzero as fz
from fromzero.data.catalogue import NAMED_SETS


def write_digits(folder: Path, each: int) -> None:
    images, labels = NAMED_SETS["mnist-5k"].read()
    for digit in range(10):
        (folder / f"digit {digit}").mkdir(parents=True)
        for i, row in enumerate((labels == digit).nonzero()[:each, 0].tolist()):
            Image.fromarray(images[row, 0].numpy()).save(folder / f"digit {digit}" / f"{i}.png")


def test_the_recipe_for_photographs_learns_digits_written_out_as_images(
    asset: Callable[[str], Path], repository: Path, tmp_path: Path
) -> None:
    asset("mnist-5k")
    asset("efficientnet-lite0")
    write_digits(tmp_path / "digits", 24)
    recipe = fz.read(repository / "recipes" / "photos.yaml", f"data.train={tmp_path / 'digits'}", "data.input.size=64", "epochs=12")
    planned = fz.plan(recipe, runs=tmp_path / "runs")
    assert planned.plan.trainable_parameters == 1280 * 10 + 10 and not planned.plan.facts.model.no_stages
    outcome = fz.run(planned, quiet=True)
    assert outcome.result["validation"]["accuracy"] >= 0.7  # chance is 0.1
    body = fz.load("efficientnet-lite0").state_dict()
    kept = outcome.model.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in body.items() if not name.startswith("head."))
    found = fz.predict("run:photos", str(tmp_path / "digits" / "digit 0"), runs=tmp_path / "runs")
    assert sum(row.answer == "digit 0" for row in found.rows) >= 18
