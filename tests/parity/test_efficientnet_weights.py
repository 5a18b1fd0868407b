"""EfficientNet-Lite0's published ImageNet weights: they load whole, and see what is on scikit-learn's two photographs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fromzero.models.efficientnet import FAMILY
from fromzero.weights import open_pretrained
from fromzero.weights.translate import to_ours, to_theirs

PHOTOS = "pypi:scikit-learn==1.9.1/sklearn/datasets/images/"


@pytest.fixture(scope="module")
def tensors(asset: Callable[[str], Path]) -> dict[str, Tensor]:
    return dict(open_pretrained(str(asset("efficientnet-lite0"))).tensors)


def loaded(tensors: dict[str, Tensor]) -> nn.Module:
    model = FAMILY.build({})
    model.load_state_dict(to_ours(tensors, FAMILY.names({}, tensors.keys()), file="the .pth", ignored=FAMILY.ignored), strict=True)
    return model.eval()


def photograph(path: Path) -> Tensor:
    """(1, 3, 224, 224) in [0, 1]: the middle square of the photo at 256/224 of the size, as the published tests cut it"""
    image = Image.open(path).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255


def test_every_published_tensor_is_used_and_comes_back_in_the_same_bits(tensors: dict[str, Tensor]) -> None:
    assert len(tensors) == 296
    written = to_theirs(loaded(tensors).state_dict(), FAMILY.names({}, ()))
    assert set(written) == set(tensors)
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("photo", "best", "shares"),
    [
        ("flower.jpg", (985, 947, 309), (0.364, 0.047, 0.046)),  # daisy, mushroom, bee
        ("china.jpg", (698, 442, 663), (0.315, 0.140, 0.077)),  # palace, bell cote, monastery
    ],
)
def test_the_photographs_show_a_daisy_and_a_palace(
    tensors: dict[str, Tensor], asset: Callable[[str], Path], photo: str, best: tuple[int, ...], shares: tuple[float, ...]
) -> None:
    path = asset(PHOTOS + photo)
    with torch.no_grad():
        found = loaded(tensors)(photograph(path)).softmax(1)[0].topk(3)
    assert tuple(found.indices.tolist()) == best
    assert found.values.tolist() == pytest.approx(shares, abs=1e-3)
