"""Few labels: fractions, images per class, and lists of names."""

import numpy as np
import pytest

from jepa_kit.evaluation.protocols.subsets import Subset, listed_samples

LABELS = np.repeat([0, 1, 2], [500, 300, 10])


@pytest.mark.parametrize(("text", "counts"), [("1%", [5, 3, 1]), ("12.5%", [62, 38, 1]), ("4/class", [4, 4, 4])])
def test_so_many_of_each_class(text, counts):
    chosen = Subset(text).draw(LABELS, seed=0, draw=0)
    assert np.array_equal(np.bincount(LABELS[chosen]), counts)
    assert np.all(np.diff(chosen) > 0)


def test_draws_differ_and_repeat():
    first, second = (Subset("10%").draw(LABELS, seed=0, draw=draw) for draw in (0, 1))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, Subset("10%").draw(LABELS, seed=0, draw=0))
    assert not np.array_equal(first, Subset("10%").draw(LABELS, seed=1, draw=0))


def test_smaller_subsets_are_in_larger_ones():
    small, large = (set(Subset(text).draw(LABELS, seed=3, draw=2)) for text in ("1%", "10%"))
    assert small < large


def test_all():
    assert Subset("all").is_all
    assert np.array_equal(Subset("all").draw(LABELS, seed=0, draw=0), np.arange(810))


@pytest.mark.parametrize("text", ["", "1", "0%", "100%", "0/class", "ten/class", "-1%", "1 %"])
def test_malformed_subsets(text):
    with pytest.raises(ValueError) as error:
        Subset(text)
    assert str(error.value) == f"subsets (={text!r}) must be 'all', a fraction as '1%', or images as '10/class'"


def test_more_than_a_class_has():
    with pytest.raises(ValueError) as error:
        Subset("11/class").draw(LABELS, seed=0, draw=0)
    assert str(error.value) == "subsets (='11/class') needs 11 images, but class 2 has 10"


KEYS = ["train/n01/n01_3", "train/n01/n01_10", "train/n02/0001", "train/n03/0001"]


def test_names_of_files(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("n01_10.JPEG\n\ntrain/n01/n01_3\ntrain/n03/0001.png\n")
    assert listed_samples(str(file), KEYS.__getitem__, 4).tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n", "must be a file with a name of a sample on each line; it is empty"),
        ("n01_3\nn09_1.JPEG\n", "1 of 2 are no sample's, first 'n09_1.JPEG'"),
        ("0001\n", "1 of 1 are several samples', first '0001'"),
    ],
)
def test_names_that_are_wrong(tmp_path, text, message):
    file = tmp_path / "list.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match="names") as error:
        listed_samples(str(file), KEYS.__getitem__, 4)
    assert message in str(error.value)
