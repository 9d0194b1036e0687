"""Images with detail at every scale, as photographs have, and their files."""

import io

import numpy as np
from PIL import Image


def photo(height, width, seed=0):
    """Return an image of noise at several scales."""
    rng = np.random.default_rng([seed, height, width])
    total = np.zeros((height, width, 3))
    for cells, share in ((3, 0.5), (8, 0.3), (30, 0.2), (max(height, width), 0.12)):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += share * np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    return Image.fromarray(np.clip(total - 14, 0, 255).astype(np.uint8))


def saved(image, file_format="JPEG", **options):
    out = io.BytesIO()
    image.save(out, format=file_format, **options)
    return out.getvalue()
