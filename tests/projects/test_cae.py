"""CAE: the check passes on the recording and sees faults; its parts by plain maths; a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from jepa_kit.config import load_config
from jepa_kit.engine.checkpoint.format import load_checkpoint
from jepa_kit.errors import ConfigError
from jepa_kit.from_config import build_recipe
from jepa_kit.interop.tensor_files import write_file
from jepa_kit.structures import MaskBatch, PatchSets, View
from jepa_kit.training import train
from jepa_kit.trials.recorded import Recorded, Report
from projects.cae import check
from projects.cae.parts import Decoder, Regressor

CONFIGS = Path(__file__).parents[2] / "projects/cae/configs"


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Overrides of quick.yaml, with a tokenizer of 5 codes."""
    write_file(tmp_path / "codes.safetensors", {"centroids": torch.randn(5, 48)}, {})
    sizes = ["data.image_size=16", "encoder.patch_size=4", "encoder.embed_dim=12", "encoder.depth=1"]
    return [*sizes, f"code_target.tokenizer={tmp_path}/codes.safetensors", "code_target.vocabulary=5"]


def test_the_recording_is_reproduced(fixtures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(fixtures / "methods/cae"), "--tolerance", "1e-12"]) == 0
    assert "not read" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "failed"),
    [
        ("layer_norm_eps", 1e-4, "step 0: predicted tokens"),
        ("num_heads", 2, "step 0: predicted tokens"),
        ("decoder_num_heads", 2, "step 0: predicted tokens"),
        ("align_loss_weight", 1.0, "step 0: loss of alignment"),
        ("lr", 0.2, "step 1: predicted tokens"),
    ],
)
def test_another_setting_is_seen(altered: Any, key: str, value: Any, failed: str) -> None:
    report = Report()
    check.check(altered("cae", key, value), report)
    assert report.failed[0] == failed


def test_a_decoder_of_another_width_is_refused(altered: Any) -> None:
    with pytest.raises(ValueError, match="decoder_embed_dim must be embed_dim"):
        check.check(altered("cae", "decoder_embed_dim", 12), Report())


def test_the_check_builds_the_config_of_the_project(fixtures: Path, same_parts: Any) -> None:
    recording = check.config_of(Recorded(fixtures / "methods/cae").meta)
    shipped = load_config(CONFIGS / "in1k_vitb16.yaml")
    assert recording.recipe == shipped.recipe
    same_parts(recording, shipped, without=("code_target", "masker"), options=("decay_tokens",))


def ragged_masks() -> MaskBatch:
    """Two contexts; the first has two target sets, one of one patch."""
    context = PatchSets.pack([torch.tensor([0, 3, 9]), torch.tensor([15])])
    targets = PatchSets.pack(
        [torch.tensor([1]), torch.tensor([4, 5]), torch.tensor([2, 8, 7])], torch.tensor([0, 0, 1])
    )
    return MaskBatch(context, targets, (4, 4), torch.tensor([0, 0, 1]))


def test_a_set_is_predicted_from_its_own_context_alone() -> None:
    """Sets of other lengths beside it change nothing: the regressor and the decoder of each set alone give the same."""
    torch.manual_seed(0)
    masks, sizes = ragged_masks(), {"embed_dim": 8, "grid": (4, 4), "num_heads": 2, "depth": 2, "layer_scale": 1.0}
    regressor, decoder = Regressor(out_dim=8, **sizes).double(), Decoder(out_dim=5, **sizes).double()
    context = torch.randn(masks.context.num_patches, 8, dtype=torch.float64)
    tokens = regressor(context, masks)
    scores = decoder(tokens, masks)
    rows, sets = context.split(masks.context.lengths.on_host), masks.context.split()
    alone = []
    for patches, of in zip(masks.targets.split(), masks.context_of.tolist(), strict=True):
        one = MaskBatch(PatchSets.pack([sets[of]]), PatchSets.pack([patches]), (4, 4), torch.tensor([0]))
        own = regressor(rows[of], one)
        alone.append((own, decoder(own, one)))
    for ours, theirs in zip((tokens, scores), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.cat(theirs), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_dim": 9}, r"out_dim \(=9\) of the target must be the encoder's width \(=8\)"),
        ({"depth": 0}, r"depth \(=0\) must be at least 1"),
        ({"num_heads": 3}, r"num_heads \(=3\) must divide the width \(=8\)"),
    ],
)
def test_refuses_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Regressor(**{"embed_dim": 8, "out_dim": 8, "grid": (4, 4), "num_heads": 2, **options})


def test_the_loss_is_twice_the_alignment_plus_the_codes(small: list[str]) -> None:
    torch.manual_seed(0)
    cae: Any = build_recipe(load_config(CONFIGS / "quick.yaml", [*small, "loss.weight=2.0"])).double()
    masks = ragged_masks()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    out = cae(View(images, masks))
    tokens = cae.predictor(cae.encoder(images, masks.context), masks)
    alignment = F.mse_loss(tokens, cae.encoder(images, masks.targets))
    codes = F.cross_entropy(cae.code_predictor(tokens, masks), cae.code_target(images, masks.targets, None))
    assert out.terms.keys() == {"l2", "codes"}
    pairs = zip((*out.terms.values(), out.loss), (alignment, codes, 2 * alignment + codes), strict=True)
    assert all(ours.item() == pytest.approx(theirs.item(), rel=1e-12) for ours, theirs in pairs)
    assert not out.prediction.target.requires_grad


@pytest.mark.integration
def test_a_run(small: list[str], shards: Path, tmp_path: Path) -> None:
    train_options = ["train.batch_size=10", "train.epochs=2", f"train.output_dir={tmp_path}/run", "train.device=cpu"]
    train(load_config(CONFIGS / "quick.yaml", [*small, f"data.shards={shards}", *train_options]))
    model = load_checkpoint(tmp_path / "run/checkpoint_00000004.pt").model
    assert [name for name in model if name.startswith(("target", "code_target"))] == [
        "code_target.tokenizer._extra_state"
    ]


def test_a_tokenizer_of_another_vocabulary_is_named_by_its_slot(small: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"code_target: vocabulary \(=6\) must be the number of codes of .* \(=5\)"):
        build_recipe(load_config(CONFIGS / "quick.yaml", [*small, "code_target.vocabulary=6"]))
