"""Sets of patches: what they refuse, and what they give back."""

from __future__ import annotations

import ast
import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jepa_kit.set_lengths import SetLengths
from jepa_kit.structures import MaskBatch, Output, PatchSets, Prediction, Progress, View

LENGTHS = (3, 1, 4)


def make_sets(lengths: tuple[int, ...] = LENGTHS, num_patches: int = 12) -> PatchSets:
    torch.manual_seed(0)
    index = torch.cat([torch.randperm(num_patches)[:n].sort().values for n in lengths])
    return PatchSets(index, torch.arange(len(lengths)), SetLengths(lengths))


def make_masks(context: PatchSets | None = None, targets: PatchSets | None = None) -> MaskBatch:
    context = make_sets() if context is None else context
    targets = make_sets((2, 3, 1)) if targets is None else targets
    return MaskBatch(context, targets, (3, 4), torch.arange(len(targets)))


# --- SetLengths ---


def test_lengths_know_their_boundaries() -> None:
    lengths = SetLengths(LENGTHS)
    assert list(lengths) == [3, 1, 4]
    assert len(lengths) == 3
    assert (lengths.total, lengths.longest, lengths.uniform) == (8, 4, False)
    assert lengths.offsets.tolist() == [0, 3, 4, 8]
    assert lengths.offsets.dtype == torch.int32
    assert lengths.set_of_token.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert lengths.position.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert lengths.device.type == "cpu"


def test_lengths_of_one_size_are_uniform() -> None:
    assert SetLengths([5]).uniform
    assert SetLengths([2, 2, 2]).uniform
    assert not SetLengths([2, 2, 3]).uniform


@pytest.mark.parametrize("each", [LENGTHS, (4, 4)])
def test_more_tokens_in_each_set(each: tuple[int, ...]) -> None:
    lengths = SetLengths(each, whole=each == (4, 4))
    more, expected = lengths.plus(3), SetLengths([n + 3 for n in each])
    assert more is lengths.plus(3)
    assert lengths.plus(0) is lengths
    for name in ("on_host", "total", "longest", "uniform"):
        assert getattr(more, name) == getattr(expected, name), name
    assert more.whole == lengths.whole
    assert torch.equal(more.offsets, expected.offsets)
    assert more.offsets.dtype == torch.int32
    assert torch.equal(more.set_of_token, expected.set_of_token)
    assert more.plus(-3) == lengths


@pytest.mark.parametrize(("each", "other"), [((7, 3, 9), (5, 1, 2)), ((7, 3), (5, 1)), ((4, 4), (1, 1))])
def test_what_is_left_without_other_sets(each: tuple[int, ...], other: tuple[int, ...]) -> None:
    expected = SetLengths([i - j for i, j in zip(each, other, strict=True)])
    found = SetLengths(each).minus(SetLengths(other))
    for name in ("on_host", "total", "longest", "uniform", "whole"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.each.tolist() == expected.each.tolist()
    assert torch.equal(found.offsets, expected.offsets)
    assert found.offsets.dtype == torch.int32
    assert torch.equal(found.position, expected.position)


@pytest.mark.parametrize("lengths", [[2.5, 1.5], (2.0, 1.0)])
def test_lengths_are_integers(lengths: Any) -> None:
    with pytest.raises(ValueError, match=rf"lengths \(={lengths[0]}, ...\) must be integers, not float64"):
        SetLengths(lengths)


def test_lengths_compare_by_value() -> None:
    assert SetLengths([1, 2]) == SetLengths((1, 2))
    assert hash(SetLengths([1, 2])) == hash(SetLengths((1, 2)))
    assert SetLengths([1, 2]) != SetLengths([2, 1])
    assert SetLengths([1, 2]) != (1, 2)
    assert repr(SetLengths([1, 2])) == "SetLengths(2 sets, 3 tokens, uniform=False)"


def test_lengths_moved_elsewhere_drop_what_was_derived_for_the_old_place() -> None:
    lengths = SetLengths(LENGTHS)
    lengths.layouts["padded"] = object()
    moved = lengths.map_tensors(lambda x: x.to("meta"))
    assert moved == lengths
    assert moved.device.type == "meta"
    assert moved.layouts == {}


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((), r"lengths \(=\(\)\) must name at least one set"),
        ((2, 0), r"lengths\[1\] \(=0\) must be at least 1"),
        ((2, 3, -1), r"lengths\[2\] \(=-1\) must be at least 1"),
    ],
)
def test_lengths_refuse(lengths: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SetLengths(lengths)


# --- PatchSets ---


@pytest.mark.parametrize(
    ("index", "image", "lengths", "message"),
    [
        (torch.zeros(3), torch.zeros(1).long(), [3], r"index must be a 1-D int64 tensor, not torch.float32 of shape"),
        (torch.zeros(3, 1).long(), torch.zeros(1).long(), [3], r"index must be a 1-D int64 tensor, .* \(3, 1\)"),
        (torch.zeros(3).long(), torch.zeros(1).int(), [3], r"image must be a 1-D int64 tensor, not torch.int32"),
        (torch.zeros(3).long(), torch.zeros(1).long(), [2], r"lengths add up to 2, but index holds 3 patches"),
        (torch.zeros(3).long(), torch.zeros(2).long(), [3], r"image names 2 sets, but there are 1 lengths"),
        (torch.zeros(3).long(), torch.zeros(2).long(), [3, 0], r"lengths\[1\] \(=0\) must be at least 1"),
    ],
)
def test_patch_sets_refuse(index: torch.Tensor, image: torch.Tensor, lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchSets(index, image, lengths)  # type: ignore[arg-type]


def test_patch_sets_are_frozen() -> None:
    with pytest.raises(AttributeError):
        make_sets().index = torch.zeros(8).long()  # type: ignore[misc]


def test_full_holds_every_patch_of_every_image() -> None:
    sets = PatchSets.full(2, 3)
    assert sets.index.tolist() == [0, 1, 2, 0, 1, 2]
    assert sets.image_of_token.tolist() == [0, 0, 0, 1, 1, 1]
    assert sets.uniform
    assert (len(sets), sets.num_patches) == (2, 6)


def test_from_padded_is_a_table_set_by_set() -> None:
    table = torch.tensor([[1, 2], [0, 5], [3, 4]])
    sets = PatchSets.from_padded(table)
    assert sets.image.tolist() == [0, 1, 2]
    assert [s.tolist() for s in sets.split()] == table.tolist()
    assert PatchSets.from_padded(table, torch.tensor([1, 0, 1])).image.tolist() == [1, 0, 1]


def test_split_gives_the_sets_back() -> None:
    sets = make_sets()
    assert [len(s) for s in sets.split()] == list(LENGTHS)
    assert torch.equal(torch.cat(sets.split()), sets.index)


def test_gather_takes_patches_out_of_their_own_image() -> None:
    sets = PatchSets(torch.tensor([5, 0, 2, 7]), torch.tensor([1, 0]), SetLengths([1, 3]))
    x = torch.randn(2, 8, 3, requires_grad=True)
    taken = sets.gather(x)
    assert torch.equal(taken, torch.stack([x[1, 5], x[0, 0], x[0, 2], x[0, 7]]))
    taken.sum().backward()
    assert x.grad is not None
    assert x.grad.sum() == 12
    assert sets.gather(torch.arange(16).view(2, 8)).tolist() == [13, 0, 2, 7]


# --- MaskBatch ---


def test_sets_of_an_image_are_numbered_in_their_order() -> None:
    sets = PatchSets.pack([torch.tensor([0])] * 6, torch.tensor([1, 0, 1, 2, 1, 0]))
    assert sets.number.tolist() == [0, 0, 1, 0, 2, 1]


def test_a_sequence_is_a_context_and_its_target() -> None:
    masks = make_masks()
    context, targets = masks.context.lengths.on_host, masks.targets.lengths.on_host
    assert masks.sequences.on_host == tuple(context[c] + n for c, n in zip((0, 1, 2), targets, strict=True))


def test_masks_are_born_on_the_host() -> None:
    masks = make_masks()
    with pytest.raises(ValueError, match="context_of is on meta: make masks on the host, then call to"):
        MaskBatch(masks.context, masks.targets, masks.grid, masks.context_of.to("meta"))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (12, r"context holds patch 12, but a grid of 3 x 4 has patches 0 to 11"),
        (-1, r"context holds patch -1, but a grid of 3 x 4"),
    ],
)
def test_masks_refuse_a_context_patch_outside_the_grid(index: int, message: str) -> None:
    context = PatchSets(torch.tensor([0, index, 1]), torch.arange(3), SetLengths([1, 1, 1]))
    with pytest.raises(ValueError, match=message):
        make_masks(context)


def test_masks_refuse_a_target_patch_outside_the_grid() -> None:
    targets = PatchSets(torch.tensor([0, 1, 40]), torch.arange(3), SetLengths([1, 1, 1]))
    with pytest.raises(ValueError, match=r"targets holds patch 40, but a grid of 3 x 4 has patches 0 to 11"):
        make_masks(targets=targets)


@pytest.mark.parametrize(
    ("context_of", "message"),
    [
        (torch.arange(2), r"context_of must be int64 with one entry for each of the 3 target sets, not .* \(2,\)"),
        (torch.arange(3).int(), r"context_of must be int64 .* not torch.int32 of shape \(3,\)"),
        (torch.tensor([0, 1, 3]), r"context_of names context set 3, but there are sets 0 to 2"),
        (torch.tensor([0, 1, -1]), r"context_of names context set -1, but there are sets 0 to 2"),
        (torch.tensor([0, 2, 1]), r"context_of pairs a target set with the context of another image"),
    ],
)
def test_masks_refuse_a_wrong_pairing(context_of: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskBatch(make_sets(), make_sets((2, 3, 1)), (3, 4), context_of)


def test_masks_move_and_stay_the_same() -> None:
    masks = make_masks()
    moved = masks.to("meta")
    assert {x.device.type for x in (moved.context.index, moved.targets.image, moved.context_of)} == {"meta"}
    assert moved.targets.lengths.offsets.device.type == "meta"
    assert moved.grid == masks.grid
    assert moved.sequences == masks.sequences
    assert moved.sequences.offsets.device.type == "meta"
    same = masks.to("cpu")
    assert torch.equal(same.targets.index, masks.targets.index)
    assert same.context.lengths == masks.context.lengths


@pytest.mark.gpu
def test_masks_pin_and_move_to_a_device() -> None:
    masks = make_masks()
    pinned = masks.pin_memory()
    assert pinned.context.index.is_pinned()
    moved = pinned.to("cuda", non_blocking=True)
    assert moved.context.lengths.offsets.is_cuda
    assert torch.equal(moved.targets.index.cpu(), masks.targets.index)


# --- Prediction ---


def prediction_of(lengths: tuple[int, ...]) -> Prediction:
    targets = make_sets(lengths)
    masks = MaskBatch(make_sets((2,) * len(lengths)), targets, (3, 4), torch.arange(len(lengths)))
    x = torch.randn(targets.num_patches, 5)
    return Prediction(x, x, torch.randn(2 * len(lengths), 5), masks)


def test_prediction_refuses_unlike_rows() -> None:
    with pytest.raises(ValueError, match=r"prediction \(6, 5\) and target \(5, 5\) differ in rows"):
        Prediction(torch.zeros(6, 5), torch.zeros(5, 5), torch.zeros(8, 5), make_masks())


@pytest.mark.parametrize(
    ("terms", "figures", "message"),
    [
        ({"a": 0.5}, {}, "terms['a'] (=float) must be a tensor []"),
        ({}, {"std": torch.ones(8)}, "figures['std'] (=(8,)) must be a tensor []"),
        ([torch.ones(())], {}, "terms (=list) must be a mapping from names to tensors []"),
    ],
)
def test_terms_and_figures_are_numbers_by_name(terms: Any, figures: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Output(torch.zeros(()), terms, figures=figures)


def test_every_set_counts_the_same_in_a_mean() -> None:
    lengths = (1, 7, 2)
    values = torch.randn(10, dtype=torch.float64)
    expected = sum(float(part.mean()) for part in values.split(lengths)) / len(lengths)
    assert float(prediction_of(lengths).mean(values)) == pytest.approx(expected, abs=1e-15)


def test_a_mean_over_sets_of_one_length_is_the_plain_mean() -> None:
    values = torch.randn(12)
    assert torch.equal(prediction_of((4, 4, 4)).mean(values), values.mean())


# One set of image 0, three of image 1, two of image 2.
UNLIKE = torch.tensor([0, 1, 2, 1, 2, 1])


def unlike_masks(lengths: tuple[int, ...]) -> MaskBatch:
    targets = PatchSets(torch.arange(sum(lengths)) % 12, UNLIKE, SetLengths(lengths))
    return MaskBatch(make_sets((2, 2, 2)), targets, (3, 4), UNLIKE)


@pytest.mark.parametrize("lengths", [(4, 1, 3, 2, 5, 2), (3,) * 6], ids=["ragged", "of one length"])
def test_every_image_counts_the_same_in_a_mean(lengths: tuple[int, ...]) -> None:
    values = torch.randn(sum(lengths), dtype=torch.float64)
    of_sets = [float(part.mean()) for part in values.split(lengths)]
    of_images = [np.mean([v for v, b in zip(of_sets, UNLIKE.tolist(), strict=True) if b == k]) for k in range(3)]
    masks = unlike_masks(lengths)
    x = torch.zeros(sum(lengths), 5)
    for held in (masks, masks.to("cpu"), pickle.loads(pickle.dumps(masks))):
        found = Prediction(x, x, torch.zeros(6, 5), held).mean(values)
        assert float(found) == pytest.approx(np.mean(of_images), abs=1e-15)


def test_shares_are_made_on_the_host_and_only_where_images_differ() -> None:
    assert make_masks().shares is None
    masks = unlike_masks((1,) * 6)
    assert masks.shares is not None
    assert masks.shares.tolist() == [3, 9, 6, 9, 6, 9]
    moved = masks.to("meta")
    assert moved.shares is not None
    assert moved.shares.device.type == "meta"


def test_sets_masks_and_predictions_are_compared_as_objects() -> None:
    """Their tensors have no single truth value, and caches take them as keys."""
    for make in (make_sets, make_masks, lambda: prediction_of((4, 4))):
        one, other = make(), make()
        assert one == one
        assert one != other
        assert one != dataclasses.replace(one)
        assert len({one, other, one}) == 2


# --- parts of a batch ---


def test_parts_are_the_sets_of_their_images() -> None:
    """Several contexts an image, target sets in any order."""
    context = PatchSets(torch.arange(9), torch.tensor([0, 2, 1, 0]), SetLengths([2, 3, 1, 3]))
    targets = PatchSets(torch.tensor([3, 4, 5, 6, 7, 8]), torch.tensor([2, 0, 1, 0]), SetLengths([1, 2, 2, 1]))
    masks = MaskBatch(context, targets, (3, 4), torch.tensor([1, 3, 2, 0]))
    first, second = masks.split([0, 1, 3])
    assert [s.tolist() for s in first.context.split()] == [[0, 1], [6, 7, 8]]
    assert [s.tolist() for s in first.targets.split()] == [[4, 5], [8]]
    assert first.context.image.tolist() == first.targets.image.tolist() == [0, 0]
    assert first.context_of.tolist() == [1, 0]
    assert [s.tolist() for s in second.context.split()] == [[2, 3, 4], [5]]
    assert [s.tolist() for s in second.targets.split()] == [[3], [6, 7]]
    assert second.context.image.tolist() == second.targets.image.tolist() == [1, 0]
    assert second.context_of.tolist() == [0, 1]
    assert (first.sequences.on_host, second.sequences.on_host) == ((5, 3), (4, 3))


def test_masks_that_were_moved_know_what_they_were_moved_from() -> None:
    """Parts are made on the host, so that nothing waits for a device to tell which set is whose."""
    masks = make_masks()
    moved = masks.to("meta")
    assert moved.host() is masks
    parts = moved.split([0, 1, len(masks.context)])
    assert {part.context.index.device.type for part in parts} == {"meta"}
    assert sum(part.targets.num_patches for part in parts) == masks.targets.num_patches


def test_parts_move_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    masks, waits = make_masks().to("meta"), []
    plain = MaskBatch.to

    def to(self: MaskBatch, device: Any, non_blocking: bool = False) -> MaskBatch:
        waits.append(not non_blocking)
        return plain(self, device, non_blocking)

    monkeypatch.setattr(MaskBatch, "to", to)
    masks.split([0, 1, 3])
    assert waits == [False, False]


HIDDEN = PatchSets(
    torch.tensor([3, 1, 2, 0, 7]), torch.tensor([1, 0]), SetLengths([2, 3]), torch.tensor([1, 0, 0, 1, 1]).bool()
)


def rows(sets: PatchSets) -> list[tuple[int, list[int], list[bool] | None]]:
    """(image, patches, hidden) of each set."""
    hidden = (
        [None] * len(sets) if sets.hidden is None else [x.tolist() for x in sets.hidden.split(sets.lengths.on_host)]
    )
    return list(zip(sets.image.tolist(), [x.tolist() for x in sets.split()], hidden, strict=True))


def test_every_method_keeps_hidden_patches():
    assert rows(HIDDEN) == [(1, [3, 1], [True, False]), (0, [2, 0, 7], [False, True, True])]
    assert rows(HIDDEN.take(np.array([1, 0, 1]))) == [rows(HIDDEN)[k] for k in (1, 0, 1)]
    assert rows(HIDDEN.of_images(1, 2)) == [(0, [3, 1], [True, False])]
    assert rows(HIDDEN.select(HIDDEN.hidden)) == [(1, [3], [True]), (0, [0, 7], [True, True])]
    assert rows(HIDDEN.map_tensors(lambda x: x.clone())) == rows(HIDDEN)
    assert rows(PatchSets.from_dict(HIDDEN.to_dict())) == rows(HIDDEN)
    seen = PatchSets.pack([torch.tensor([5])], torch.tensor([2]))
    assert rows(PatchSets.cat([HIDDEN, seen])) == [*rows(HIDDEN), (2, [5], [False])]
    assert PatchSets.cat([seen, seen]).hidden is None
    assert "hidden" not in seen.to_dict()


def test_shown_patches_are_not_hidden():
    assert [x.tolist() for x in HIDDEN.shown()] == [[1], [2]]
    assert [x.tolist() for x in PatchSets.pack([torch.tensor([5, 2])]).shown()] == [[5, 2]]


def test_hidden_must_be_one_boolean_per_patch():
    with pytest.raises(ValueError, match=r"hidden must be bool of the shape of index \(2,\), not torch.int64 of shape"):
        PatchSets(torch.arange(2), torch.arange(1), SetLengths([2]), torch.zeros(2).long())


def test_select_needs_a_patch_of_each_set():
    with pytest.raises(ValueError, match=r"lengths\[0\] \(=0\) must be at least 1"):
        HIDDEN.select(torch.tensor([0, 0, 1, 1, 1]).bool())


def test_pool_is_the_mean_over_each_set():
    tokens = torch.randn(5, 3, dtype=torch.float64)
    expected = torch.stack([tokens[:2].mean(0), tokens[2:].mean(0)])
    assert torch.allclose(HIDDEN.pool(tokens), expected, atol=1e-15)
    assert torch.allclose(PatchSets.full(5, 1).pool(tokens), tokens, atol=0)


def test_from_mask_takes_the_true_patches_of_each_row():
    chosen = np.array([[True, False, True], [False, True, False]])
    assert rows(PatchSets.from_mask(chosen, np.array([1, 0]))) == [(1, [0, 2], None), (0, [1], None)]


@pytest.mark.parametrize("folder", ["jepa_kit", "projects"])
def test_sets_are_built_by_the_methods_of_their_type(folder):
    """A field that is added to PatchSets must not be lost silently by code that calls the constructor."""
    root = Path(__file__).parents[1]
    calls = {
        f"{file.relative_to(root)}:{node.lineno}"
        for file in (root / folder).rglob("*.py")
        if file.name != "patch_sets.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "PatchSets"
    }
    assert not calls


def test_view_splits_like_its_parts():
    masks = MaskBatch(
        PatchSets.from_padded(torch.tensor([[0, 1], [2, 3], [1, 2]])), PatchSets.full(3, 4), (2, 2), torch.arange(3)
    )
    view = View(torch.arange(3.0).reshape(3, 1, 1, 1), masks, torch.arange(6.0).reshape(3, 2))
    first, second = view.split([0, 1, 3])
    assert (len(first), len(second)) == (1, 2)
    assert second.images.flatten().tolist() == [1.0, 2.0]
    assert second.masks is not None
    assert rows(second.masks.context) == [(0, [2, 3], None), (1, [1, 2], None)]
    assert second.action is not None
    assert second.action.tolist() == [[2.0, 3.0], [4.0, 5.0]]
    bare = View(view.images).map_tensors(lambda x: x + 1)
    assert bare.images.flatten().tolist() == [1.0, 2.0, 3.0]
    assert bare.masks is None
    assert bare.action is None
    assert [part.masks for part in bare.split([0, 3])] == [None]


def test_common_random_numbers_are_a_function_of_seed_and_step():
    def draw(progress: Progress) -> list[float]:
        return torch.rand(4, generator=progress.generator()).tolist()

    assert draw(Progress(step=3, seed=1)) == draw(Progress(step=3, where=0.5, seed=1))
    assert len({tuple(draw(Progress(step=s, seed=k))) for s in range(3) for k in range(3)}) == 9
