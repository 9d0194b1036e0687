"""The masks and the batches of a recording (record.py)."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

from record_parts import ROOT, digest, found, run

SAMPLES = 10_000


def sets_of(masks: Any) -> list[list[list[int]]]:
    """Return the patch sets of each image of a batch: its contexts and then its targets, in their order."""
    images: dict[int, list[list[int]]] = {}
    for sets in (masks.context, masks.targets):
        for image, patches in zip(sets.image.tolist(), sets.split(), strict=True):
            images.setdefault(image, []).append(patches.tolist())
    return [images[image] for image in sorted(images)]


def record_masks() -> dict[str, str]:
    """Return a digest for each masker on two grids."""
    import numpy as np

    found("build_masker")  # its module imports every masker, which registers it
    maskers, digests = found("MASKERS"), {}
    for name in maskers.names():
        for grid in ((14, 14), (9, 12)):
            masker, arrays = maskers.build(name, {}, grid=grid), []
            for epoch in (0, 3):
                masks = masker(np.arange(500, 756), seed=7, epoch=epoch, step=11 + epoch)
                for sets in (masks.context, masks.targets):
                    arrays += [sets.index.numpy(), sets.image.numpy(), np.array(list(sets.lengths))]
                arrays.append(masks.context_of.numpy())
            digests[f"{name} {grid[0]}x{grid[1]}"] = digest(*arrays)
    return digests


def make_tiny(folder: Path) -> Path:
    """Make shards of ``SAMPLES`` images of 8 x 8 random pixels."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (SAMPLES, 8, 8, 3), dtype=np.uint8)
    with tarfile.open(folder / "images.tar", "w") as tar:
        for number, image in enumerate(pixels):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            entry = tarfile.TarInfo(f"{number:05d}.png")
            entry.size = file.tell()
            file.seek(0)
            tar.addfile(entry, file)
    run("tools/make_shards.py", f"wds:{folder / 'images.tar'}", folder / "shards", "--workers", 1)
    return folder / "shards"


TRANSFORMS = """[{name: random_resized_crop}, {name: flip}, {name: colour_jitter, p: 0.8}, {name: grey},
    {name: gaussian_blur, sigma: [0.1, 1.0]}, {name: solarise}]"""


def record_order(folder: Path) -> dict[str, Any]:
    """Return digests of the order of samples, and of all batches of an epoch for two layouts of processes."""
    import numpy as np

    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores
    shards, order = make_tiny(folder), {}
    for window in (1000, 16384):
        for seed, epoch in ((0, 0), (0, 1), (5, 2)):
            made = found("epoch_order")([1000] * (SAMPLES // 1000), seed=seed, epoch=epoch, window=window)
            order[f"seed {seed} epoch {epoch} window {window}"] = digest(made)
    small = ["encoder.patch_size=2", "data.image_size=8", "masker={name: multiblock}", "data.shuffle_window=3000"]
    augmented = ["data.crop_scale=null", f"data.transforms={TRANSFORMS}"]
    config = found("load_config")(
        str(ROOT / "projects/ijepa/configs/quickstart.yaml"), [*small, *augmented, f"data.shards={shards}"]
    )

    def batches(ranks: int, workers: int) -> dict[str, str]:
        parts = [
            found("TrainLoader")(
                dataset=found("open_shards")(config),
                views=found("training_views")(config),
                batch_size=200,
                seed=3,
                rank=rank,
                world_size=ranks,
                shuffle_window=config.data.shuffle_window,
                num_workers=workers,
            ).batches(0)
            for rank in range(ranks)
        ]
        samples, images, masks = [], [], hashlib.sha256()
        for _ in range(SAMPLES // 200):
            for part in parts:
                _, batch = next(part)
                samples.append(batch.samples.numpy())
                images.append(batch.images.numpy())
                for sets in sets_of(batch.masks):
                    masks.update(json.dumps(sets).encode())
        for part in parts:
            part.close()
        return {
            "samples": digest(np.concatenate(samples)),
            "images": digest(np.concatenate(images)),
            "masks": masks.hexdigest(),
        }

    layouts = {"1 rank, no worker": batches(1, 0), "2 ranks, 3 workers each": batches(2, 3)}
    if len(set(map(str, layouts.values()))) > 1:
        raise RuntimeError(f"batches depend on ranks and workers: {layouts}")
    return {"epochs": order, "batches": layouts}
