"""Classification problems with known answers, as arrays and as a task."""

import numpy as np

from jepa_kit.evaluation.protocols.base import Features, LayerSet, Part, Task


def clusters(samples, *, classes=4, width=12, apart=1.0, seed=0):
    """Return features around one centre per class, with columns of different scale [N, D] float32, and labels [N]."""
    centres = np.random.default_rng(7).normal(size=(classes, width))
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=samples)
    features = apart * centres[labels] + random.normal(size=(samples, width))
    return (features * np.geomspace(0.01, 10, width)).astype(np.float32), labels


TRAIN, TRAIN_LABELS = clusters(400, seed=1)
TEST, TEST_LABELS = clusters(200, seed=2)
PROBLEM = (TRAIN, TRAIN_LABELS, TEST, TEST_LABELS)


def task(train, train_labels, test, test_labels, **options):
    """The problem as protocols take it: ``last`` is the last third of the columns, ``last4`` all of them, and a sample
    has four patches, of which the last is the feature and the others are noise."""
    parts = []
    for x, y in ((train, train_labels), (test, test_labels)):
        noise = np.random.default_rng(0).normal(size=(len(x), 3, x.shape[1]))
        patches = np.concatenate([noise, x[:, None]], axis=1).astype(np.float16)
        features = {
            LayerSet("last"): Features(x[:, -(x.shape[1] // 3) :]),
            LayerSet("last4"): Features(x[:, : x.shape[1] // 3], x[:, x.shape[1] // 3 :]),
            LayerSet("last", "none"): Features(patches),
        }
        parts.append(Part(features, y, None))
    return Task(train=parts[0], test=parts[1], **({"layers": "last4"} | options))
