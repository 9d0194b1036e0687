"""Cosines, ranks, principal components and moved masks of the page against numpy and by hand."""

import numpy as np
import pytest

from jepa_kit.evaluation.pictures.panels import principal_components, to_colours

IMAGES, PATCHES, WIDTH = 6, 20, 12
IMAGE, PATCH = 2, 7


@pytest.fixture(scope="module")
def tokens():
    """Return tokens [B, N, D] with three strong directions, and a prediction [D] that is near one of them."""
    random = np.random.default_rng(0)
    strong = random.normal(size=(IMAGES, PATCHES, 3)) * (6, 3, 2) @ random.normal(size=(3, WIDTH))
    x = (strong + random.normal(size=(IMAGES, PATCHES, WIDTH)) + 2).astype(np.float32)
    return x, x[IMAGE, PATCH] + 0.4 * random.normal(size=WIDTH).astype(np.float32)


def test_what_is_read_off_tokens(node, tokens):
    x, token = tokens
    value = {"matrices": x.reshape(IMAGES, -1).tolist(), "width": WIDTH, "token": token.tolist()}
    found = node("run_analysis.mjs", {**value, "image": IMAGE, "patch": PATCH})

    centre = x.mean((0, 1))
    ours, theirs = token - centre, x - centre
    cosine = theirs @ ours / np.linalg.norm(theirs, axis=-1) / np.linalg.norm(ours)
    np.testing.assert_allclose(found["maps"], cosine, atol=1e-5)
    assert found["ranked"]["rank"] == 1 + (cosine > cosine[IMAGE, PATCH]).sum()
    assert found["ranked"]["total"] == cosine.size
    best = [(one["image"], one["patch"]) for one in found["ranked"]["best"]]
    assert best == [(i, cosine[i].argmax()) for i in np.argsort(-cosine.max(1))]
    order = [i for i in np.argsort(-cosine.ravel()) if i != IMAGE * PATCHES + PATCH][:5]
    assert [one["image"] * PATCHES + one["patch"] for one in found["nearest"]] == order

    components, explained = principal_components(x)
    assert found["explained"] == pytest.approx(explained, abs=1e-4)
    np.testing.assert_allclose(theirs @ np.transpose(found["axes"]), components, atol=1e-2)
    np.testing.assert_allclose(found["colours"], 255 * to_colours(components), atol=255 * 0.05)


def test_masks_changed_by_hand(node, tokens):
    value = {"matrices": tokens[0].reshape(IMAGES, -1).tolist(), "width": WIDTH, "token": tokens[1].tolist()}
    found = node("run_analysis.mjs", {**value, "image": IMAGE, "patch": PATCH})["editing"]
    assert found == {
        "moved": [12, 13, 14, 18, 19, 20],
        "stopped": [15, 16, 17, 21, 22, 23],
        "larger": [7, 8, 9, 13, 14, 15, 19, 20, 21],
        "smallest": [7],
        "context": [0, 1, 2, 3, 4, 6],
        "followed": [3, 4, 9, 10, 12, 13],
        "covered": None,
        "base": [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 13, 14, 15, 16, 17, 19, 20, 21, 22, 23],
        "box": {"top": 1, "left": 1, "height": 2, "width": 3},
        "place": "rows 2 to 3, columns 2 to 4",
        "shapes": [True, False],
        "movable": [True, False],
    }
