"""Stacked and normalised batches against numpy."""

import numpy as np
import torch
from photos import photo
from PIL import Image

from jepa_kit.data.transforms import normalize, stack


def test_stack_and_normalize():
    images = [photo(6, 5), photo(6, 5).transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    batch = stack([np.asarray(image) for image in images])
    assert batch.dtype == torch.uint8
    assert batch.shape == (2, 3, 6, 5)
    assert torch.equal(batch, stack(images))  # Pillow's own too
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (np.stack([np.asarray(i, dtype=np.float64) for i in images]) / 255.0 - mean) / std
    ours = normalize(batch, mean, std)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    assert torch.equal(ours, normalize(batch.contiguous(), mean, std))  # in whatever order they lie
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), expected, atol=1e-6)
    assert batch.dtype == torch.uint8  # and is left as it was
    np.testing.assert_array_equal(batch[0].numpy().transpose(1, 2, 0), np.asarray(images[0]))
