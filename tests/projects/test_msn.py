"""MSN against recorded numbers of the released code, and against plain maths."""

from __future__ import annotations

import json
import math
from pathlib import Path

import contrast_recordings as recordings
import pytest
import torch

from jepa_kit.encoders import ViT
from jepa_kit.engine.optimizer import is_decayed
from jepa_kit.heads import MLPHead, Prototypes
from jepa_kit.structures import MaskBatch, PatchSets, View
from jepa_kit.target_updates import EMA, NoTargetEncoder
from projects.msn.check import main
from projects.msn.recipe import MSN

FIXTURE = Path(__file__).parents[1] / "fixtures" / "methods" / "msn"
IMAGES = 3


def recipe(target_update=None, **options) -> MSN:
    torch.manual_seed(0)
    return MSN(
        encoder=ViT(image_size=(8, 8), patch_size=4, embed_dim=8, depth=1, num_heads=2, class_token=True),
        head=MLPHead(in_dim=8, hidden=6, out_dim=5, norm="batch"),
        prototype_head=Prototypes(in_dim=5, out_dim=4),
        target_update=target_update or EMA(),
        **options,
    )


def images(side: int, seed: int) -> torch.Tensor:
    return torch.randn(IMAGES, 3, side, side, generator=torch.Generator().manual_seed(seed))


def masks(contexts: int = 1) -> MaskBatch:
    """Each context has patches 0 and 3 of 4, the target has the others."""
    image = torch.arange(IMAGES).repeat(contexts)
    kept, hidden = (PatchSets.pack([torch.tensor(x)] * IMAGES * contexts, image) for x in ([0, 3], [1, 2]))
    return MaskBatch(kept, hidden, (2, 2), torch.arange(len(kept)))


VIEWS = View(images(8, 0)), View(images(8, 1), masks()), View(images(4, 2)), View(images(4, 3))


def test_recorded_numbers(capsys):
    assert main([str(FIXTURE), "--tolerance", "1e-12"]) == 0
    printed = capsys.readouterr().out
    for quantity in ("call0: targets", "call1: me_max", "call2: gradient of prototypes", "labels of prototypes"):
        assert quantity in printed
    assert "not read" not in printed


def test_other_settings_and_a_wrong_one(tmp_path):
    path = recordings.msn(tmp_path / "other")
    assert main([str(path), "--tolerance", "1e-12"]) == 0
    content = json.loads(path.with_suffix(".json").read_text())
    content["meta"]["temperature"] = 0.21
    path.with_suffix(".json").write_text(json.dumps(content))
    assert main([str(path)]) == 1


def test_the_loss_of_views_is_that_of_their_visible_patches():
    """Each image on its own, of the masked view without the hidden patches; head and prototypes as in the recipe."""
    msn = recipe(entropy=0.5)
    out = msn(*VIEWS)

    def tokens(view: View) -> torch.Tensor:
        x = msn.encoder.embed(view.images, None)[0].unflatten(0, (IMAGES, -1))  # the class token, then patches
        kept = x[:, [0, 1, 4]] if view.masks else x
        for block in msn.encoder.blocks:
            kept = torch.stack([block(y, PatchSets.full(1, len(y)).lengths) for y in kept])
        return msn.encoder.norm(kept)[:, 0]

    z = msn.head(torch.cat([tokens(view) for view in VIEWS[1:]]))
    wanted = msn.compare(z, msn.targets(msn.target_head(tokens(VIEWS[0]))))
    torch.testing.assert_close(out.loss, wanted.loss)
    torch.testing.assert_close(out.loss, out.terms["cross_entropy"] + out.terms["me_max"] + 0.5 * out.terms["entropy"])


def test_what_is_trained():
    msn = recipe()
    msn(*VIEWS).loss.backward()
    trained = {name for name, p in msn.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in msn.named_parameters() if not name.startswith("target_")}
    assert msn.prototype_head.weight.grad.any()
    assert not is_decayed("prototype_head.weight", msn.prototype_head.weight)
    assert msn.target_head.training
    assert not msn.target_encoder.training


def test_me_max_is_zero_if_all_prototypes_are_used_alike_and_log_k_if_one_is():
    msn = recipe(temperature=1e-3)
    msn.prototype_head.weight.data = torch.eye(4, 5)
    each, one = torch.eye(4, 5), torch.eye(4, 5)[:1].expand(4, -1)
    balanced, collapsed = (msn.compare(z, msn.targets(each)).terms for z in (each, one))
    assert balanced["me_max"].item() == pytest.approx(0, abs=1e-6)
    assert collapsed["me_max"].item() == pytest.approx(math.log(4))
    assert balanced["cross_entropy"].item() == pytest.approx(0, abs=1e-6)


def test_half_precision_does_not_round_the_cosines():
    msn = recipe(temperature=0.01)
    z = torch.randn(6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = msn.log_probabilities(z)
    torch.testing.assert_close(rounded, msn.log_probabilities(z), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature \(=0.0\) must be above 0"),
        ({"sharpening": 0.0}, r"sharpening \(=0.0\) must be above 0 and at most 1"),
        ({"sharpening": 1.5}, r"sharpening \(=1.5\) must be above 0 and at most 1"),
        ({"sinkhorn": -1}, r"sinkhorn \(=-1\) must be 0 or more iterations"),
        ({"label_smoothing": 1.0}, r"label_smoothing \(=1.0\) must be in \[0, 1\)"),
        ({"target_update": NoTargetEncoder()}, "target_update makes no target encoder, which this recipe needs"),
    ],
)
def test_options_that_are_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        recipe(**options)


def test_a_target_view_with_masks():
    with pytest.raises(ValueError, match="the first view is the target and must be whole, but it has masked: true"):
        recipe()(VIEWS[1], *VIEWS[1:])


def test_a_masker_with_several_contexts():
    view = View(images(8, 1), masks(contexts=2))
    with pytest.raises(ValueError, match="masker must give each image one context: 2 anchors of 3 images have 9"):
        recipe()(VIEWS[0], view, VIEWS[2])
