"""Small images and shards for the tests of this room."""

import io

import numpy as np
from PIL import Image

from jepa_kit.data.shards.writing import Sample, write_index, write_shard


def picture(seed, height=20, width=24):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, file_format="JPEG", **options):
    out = io.BytesIO()
    image.save(out, format=file_format, **options)
    return out.getvalue()


def make_samples(count, labels=("class",)):
    """Return samples with JPEG and PNG in turn, of different sizes."""
    samples = []
    for k in range(count):
        image = picture(k, 16 + k % 5, 18 + k % 7)
        extension, data = ("jpg", encoded(image)) if k % 2 else ("png", encoded(image, "PNG"))
        samples.append(
            Sample(f"folder/{k:04d}", extension, data, {name: (k * (j + 3)) % 4 for j, name in enumerate(labels)})
        )
    return samples


def write_shards(folder, samples, per_shard, classes):
    folder.mkdir(exist_ok=True)
    parts = [
        write_shard(str(folder / f"shard-{k:06d}.tar"), samples[start : start + per_shard])
        for k, start in enumerate(range(0, len(samples), per_shard))
    ]
    write_index(str(folder), [p[0] for p in parts], [p[1] for p in parts], classes=classes, refused=[], made_by={})
    return folder
