"""The released layout: outputs, every key written back, the optimiser, and a run that goes on as it would have."""

import json
import math

import pytest
import torch

from jepa_kit.engine.checkpoint.format import Checkpoint, load_checkpoint
from jepa_kit.engine.checkpoint.state_dict import optimizer_state
from jepa_kit.engine.optimizer import optimizer_of
from jepa_kit.engine.schedules import Schedule
from jepa_kit.engine.step import train_step
from jepa_kit.errors import CheckpointError
from jepa_kit.evaluation.features import load_run
from jepa_kit.from_config import build_recipe
from jepa_kit.interop import official
from jepa_kit.interop.formats import convert, read_encoder
from jepa_kit.interop.start import resume_official
from jepa_kit.interop.weights import Reading
from jepa_kit.set_lengths import SetLengths
from jepa_kit.structures import MaskBatch, PatchSets, View
from projects.ijepa.check_parity import config_of, load_first_weights, masks_of, read_fixture

HEADS = 4


def packed(tables):
    """Tables [B, L] of patches, one after another."""
    sizes = [table.shape[1] for table in tables for _ in table]
    images = torch.arange(len(tables[0])).repeat(len(tables))
    return PatchSets(torch.cat([table.flatten() for table in tables]), images, SetLengths(sizes))


def assert_same(found, expected, at="file"):
    """Equal types, keys in order, numbers bit for bit."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), at
        for key, value in expected.items():
            assert_same(found[key], value, f"{at}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), at
        for number, value in enumerate(expected):
            assert_same(found[number], value, f"{at}[{number}]")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, at
        assert torch.equal(found, expected), at
    else:
        assert type(found) is type(expected), at
        assert found == expected, at


def test_outputs_are_the_recorded_ones(released, recorded, tmp_path):
    convert(released, tmp_path / "a.pt", to="jepa_kit", num_heads=HEADS)
    jepa = load_run(tmp_path / "a.pt").jepa
    images = recorded["images"]
    context, targets = [recorded["context_mask/0"]], [recorded[f"target_mask/{j}"] for j in range(4)]
    masks = MaskBatch(packed(context), packed(targets), grid=(8, 8), context_of=torch.arange(2).repeat(4))
    with torch.no_grad():
        found = {
            "encoder_output": jepa.encoder(images),
            "target_encoder_output": jepa.target_encoder(images),
            "prediction": jepa.predictor(jepa.encoder(images, masks.context), masks),
        }
    for name, value in found.items():
        assert (value - recorded[name].flatten(0, 1)).abs().max() < 1e-5, name


@pytest.mark.parametrize("through", [[], ["jepa_kit"], ["jepa_kit", "official", "jepa_kit"]])
def test_written_back_it_is_the_same(released, released_content, tmp_path, through):
    path = released
    for number, format in enumerate([*through, "official"]):
        convert(path, tmp_path / str(number), to=format, num_heads=HEADS)
        path = tmp_path / str(number)
    assert_same(torch.load(path, weights_only=True), released_content)


def test_names_without_module(released_content, saved, tmp_path):
    for part in official.PARTS:
        released_content[part] = {name.removeprefix("module."): v for name, v in released_content[part].items()}
    path = saved(released_content)
    convert(path, tmp_path / "back", to="official", num_heads=HEADS)
    assert_same(torch.load(tmp_path / "back", weights_only=True), released_content)


def test_a_table_that_differs_in_its_last_bit_is_kept(released_content, saved, tmp_path):
    table = released_content["predictor"]["module.predictor_pos_embed"]
    table[0, 3, 5] = torch.nextafter(table[0, 3, 5], torch.tensor(2.0))
    convert(saved(released_content), tmp_path / "back", to="official", num_heads=HEADS)
    assert_same(torch.load(tmp_path / "back", weights_only=True), released_content)


def test_moments_are_those_of_their_parameters(released, released_content):
    """Numbered by hand from the release's own order: the tables are counted, and have no state."""
    held = official.read(released, Reading(num_heads=HEADS))
    opt = released_content["opt"]
    assert [len(group["params"]) for group in opt["param_groups"]] == [14, 12, 27, 20]
    assert 0 not in opt["state"]
    assert 15 not in opt["state"]
    for number, name in (
        (1, "encoder.patch_embed.proj.weight"),
        (13, "encoder.blocks.2.mlp.fc2.weight"),
        (16, "predictor.embed.weight"),
        (26, "encoder.patch_embed.proj.bias"),
        (52, "encoder.norm.bias"),
        (53, "predictor.embed.bias"),
        (72, "predictor.proj.bias"),
    ):
        for key, value in opt["state"][number].items():
            assert torch.equal(held.optimizer[name][key], value), (name, key)
    assert torch.equal(held.optimizer["predictor.mask_token"]["exp_avg"], opt["state"][14]["exp_avg"][0])
    assert len(held.optimizer) == 71


def test_what_the_file_says_of_itself(released):
    held = official.read(released, Reading(num_heads=HEADS))
    assert held.step == 2  # 2 epochs; AdamW has counted 1 update, so an epoch had at least 1
    assert held.config["train"]["batch_size"] == 2
    assert held.config["optim"]["lr"] == 1e-3
    assert held.config["predictor"]["num_heads"] == HEADS
    assert held.origin["licence"] == "not stated (CC-BY-NC-4.0 if these are weights released by Meta)"


@pytest.mark.parametrize(
    ("lr", "expected"), [(5e-4, [5e-4, 2e-4, 1e-6]), (1e-7, [1e-7] * 3), (0.0, None), (None, None)], ids=str
)
def test_its_learning_rate(released_content, saved, lr, expected):
    """Start and end are the release's, or lower if the peak is; without a rate all are the released recipe's."""
    released_content["lr"] = lr
    optim = official.read(saved(released_content), Reading(num_heads=HEADS)).config["optim"]
    assert [optim[name] for name in ("lr", "start_lr", "final_lr")] == (expected or [1e-3, 2e-4, 1e-6])


def test_without_an_optimiser_the_step_is_not_known(released_content, saved):
    del released_content["opt"]
    held = read_encoder(saved(released_content), num_heads=HEADS).provenance
    assert (held.epoch, held.step) == (2, None)


def test_the_licence_of_the_released_files(released, tmp_path):
    path = tmp_path / "IN1K-vit.h.14-300e.pth.tar"
    path.write_bytes(released.read_bytes())
    assert read_encoder(path, num_heads=HEADS).provenance.licence == "CC-BY-NC-4.0"


def test_updates_that_the_release_skipped_are_counted(released_content, saved):
    """Gradients that overflow make no update of AdamW, but the schedules go on."""
    for state in released_content["opt"]["state"].values():
        state["step"] = torch.tensor(1247.0)
    held = official.read(saved(released_content), Reading(num_heads=HEADS))  # 2 epochs of 624 = 1248
    assert (held.step, held.config["train"]["steps_per_epoch"]) == (1248, 624)


def test_a_run_goes_on_as_it_would_have(fixtures, tmp_path):
    """10 of the 30 recorded steps, out into the released layout and in again, then the other 20."""
    fixture = read_fixture(str(fixtures / "released_step"))
    config = config_of(fixture.meta)
    images = fixture.take("images")

    def fresh():
        jepa = build_recipe(config).to(fixture.dtype).train()
        return jepa, optimizer_of(jepa, config.optim)

    def run(jepa, optimizer, steps):
        optim, train = config.optim, config.train
        schedule = Schedule(
            epochs=train.epochs,
            steps_per_epoch=train.steps_per_epoch,
            lr=optim.lr,
            start_lr=optim.start_lr,
            final_lr=optim.final_lr,
            warmup_epochs=optim.warmup_epochs,
            weight_decay=optim.weight_decay,
            momentum=jepa.momentum,
        )
        for step in steps:
            masks = masks_of(fixture, step, jepa.encoder.grid)
            out = train_step(jepa, optimizer, schedule(step), [View(images[step % len(images)], masks)])
            assert out.loss.item() == pytest.approx(fixture.trajectory[step]["loss"], rel=1e-8), step

    jepa, optimizer = fresh()
    load_first_weights(fixture, jepa, _Ignored())
    run(jepa, optimizer, range(10))
    held = Checkpoint(10, jepa.state_dict(), optimizer_state(optimizer), config.to_dict(), {}, {})
    official.write(held, tmp_path / "epoch1.pth.tar")
    content = torch.load(tmp_path / "epoch1.pth.tar", weights_only=True)
    group = content["opt"]["param_groups"][0]
    assert group["lr"] == pytest.approx(fixture.trajectory[9]["lr"], rel=1e-12)
    assert group["weight_decay"] == pytest.approx(fixture.trajectory[9]["weight_decay"], rel=1e-12)
    assert [len(g["params"]) for g in content["opt"]["param_groups"]] == [14, 12, 27, 20]
    del content["jepa_kit"]  # as the release would have written it
    torch.save(content, tmp_path / "epoch1.pth.tar")

    torch.manual_seed(1)
    jepa, optimizer = fresh()
    start = resume_official(jepa, optimizer, tmp_path / "epoch1.pth.tar", config.train.steps_per_epoch)
    assert start.step == 10
    run(jepa, optimizer, range(10, 30))


class _Ignored:
    def add(self, *values):
        pass


def test_a_run_of_ours_comes_back_whole(released, tmp_path):
    """Config, step, data and origin are in the note that the released code does not look at."""
    held = official.read(released, Reading(num_heads=HEADS))
    ours = Checkpoint(7, held.model, held.optimizer, held.config, {"torch": "2"}, {"samples": 9}, {"source": "x"})
    official.write(ours, tmp_path / "a")
    back = official.read(tmp_path / "a")
    for name in ("step", "config", "versions", "data", "origin"):
        assert getattr(back, name) == getattr(ours, name), name
    assert_same(back.optimizer, {name: dict(state) for name, state in ours.optimizer.items()})
    content = torch.load(tmp_path / "a", weights_only=True)
    assert (content["epoch"], content["batch_size"], content["world_size"], content["lr"]) == (7, 2, 1, 1e-3)


def test_no_part_is_missing(released_content, saved):
    del released_content["encoder"], released_content["target_encoder"]
    with pytest.raises(CheckpointError, match=r"has none of the formats|not a checkpoint of any known layout"):
        read_encoder(saved(released_content))
    with pytest.raises(
        CheckpointError, match="has no encoder and no target_encoder; it contains predictor, opt, scaler"
    ):
        official.read(saved(released_content))


def test_the_encoder_that_is_not_there(released_content, saved):
    del released_content["target_encoder"]
    with pytest.raises(CheckpointError, match=r"has no target encoder; it contains 'context'"):
        read_encoder(saved(released_content), num_heads=HEADS)


def changed(part, name, value):
    def change(content):
        if value is None:
            del content[part][name]
        else:
            content[part][name] = value(content[part].get(name))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            changed("target_encoder", "module.blocks.1.attn.qkv.weight", None),
            r"target_encoder of .*changed.pth.tar: ViT of width 48.* missing: blocks.1.attn.qkv.weight",
        ),
        (
            changed("encoder", "module.cls_token", lambda _: torch.zeros(1)),
            r"encoder of .* is a ViT with extra tokens \(cls_token\)",
        ),
        (
            changed("encoder", "module.blocks.0.mlp.fc2.bias", lambda _: torch.zeros(7)),
            r"misshapen: blocks.0.mlp.fc2.bias \(\(7,\), not \(48,\)\)",
        ),
        (
            changed("target_encoder", "module.pos_embed", lambda x: x.roll(1, 1)),
            r"pos_embed in target_encoder of .* is not the sine-cosine table of a grid of 8 x 8: it differs by up to 2",
        ),
        (
            changed("target_encoder", "module.pos_embed", lambda x: x[:, :63]),
            r"has positions for 63 patches, which are no square, and the table is that of no grid; give image_size",
        ),
        (
            changed("encoder", "module.pos_embed", lambda x: x[:, :49]),
            r"pos_embed in encoder of .* has 49 positions, but a grid of 8 x 8 has 64",
        ),
        (changed("encoder", "module.pos_embed", None), r"encoder of .* has no pos_embed \[1, N, D\]"),
        (
            changed("target_encoder", "module.patch_embed.proj.weight", None),
            r"is not a ViT as I-JEPA has it: patch_embed.proj.weight .* must exist; it contains patch_embed.proj.bias",
        ),
        (
            changed("predictor", "module.predictor_embed.weight", None),
            r"optimiser .* has groups of \[14, 12, 27, 20\] parameters, but its weights make \[14, 11, 27, 20\]",
        ),
        (changed("opt", "state", lambda s: {**s, 0: s[1]}), r"has trained pos_embed, which the release never does"),
        (
            changed("opt", "state", lambda s: {**s, 1: s[2]}),
            r"exp_avg of encoder.patch_embed.proj.weight is \(144, 48\), not \(48, 3, 8, 8\)",
        ),
    ],
)
def test_parts_that_do_not_fit(released_content, saved, change, message):
    change(released_content)
    with pytest.raises(CheckpointError, match=message):
        read_encoder(saved(released_content), num_heads=HEADS)


@pytest.mark.parametrize(("key", "value"), [("step", "x"), ("step", True), ("config", None), ("origin", [])])
def test_a_note_of_another_type(converted, saved, key, value):
    held = torch.load(converted["official"], weights_only=True)
    held["jepa_kit"] = {"step": 3, "config": {}, "versions": {}, "data": {}, "origin": {}}
    held["jepa_kit"][key] = value
    if key != "config":
        held["jepa_kit"]["config"] = load_checkpoint(converted["jepa_kit"]).config
    with pytest.raises(CheckpointError, match="is damaged"):
        read_encoder(saved(held), num_heads=HEADS)


def test_an_optimiser_without_its_parts(released_content, saved):
    del released_content["predictor"]
    with pytest.raises(CheckpointError, match="has an optimiser, but no predictor whose moments it would be"):
        official.read(saved(released_content), Reading(num_heads=HEADS))


def test_another_predictor(released_content, saved):
    del released_content["opt"]
    released_content["predictor"] = {"module.predictor_pos_embed": torch.zeros(1, 64, 24), "module.q": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"predictor_pos_embed in predictor of .* is not the sine-cosine table"):
        official.read(saved(released_content), Reading(num_heads=HEADS))
    released_content["predictor"]["module.predictor_pos_embed"] = official.sincos_2d(24, (8, 8))[None]
    with pytest.raises(CheckpointError, match=r"predictor of .* is not the released one: no predictor_embed.weight"):
        official.read(saved(released_content), Reading(num_heads=HEADS))


def test_heads_that_nothing_tells(released):
    with pytest.raises(CheckpointError, match=r"width 48, depth 3 is none of the known sizes .* give num_heads"):
        read_encoder(released)
    with pytest.raises(CheckpointError, match=r"sizes that no encoder has: num_heads \(=5\) must divide the width"):
        read_encoder(released, num_heads=5)


def test_what_the_released_layout_has_no_place_for(released, tmp_path):
    held = official.read(released, Reading(num_heads=HEADS))
    more = Checkpoint(1, {**held.model, "losses.x.scale": torch.ones(1)}, {}, held.config, {}, {})
    with pytest.raises(CheckpointError, match=r"cannot be kept: losses.x.scale"):
        official.write(more, tmp_path / "a")


def test_an_image_that_is_no_square(released_content, saved):
    """The table tells the grid, since the formula of another one differs."""
    for part in ("encoder", "target_encoder"):
        released_content[part]["module.pos_embed"] = official.sincos_2d(48, (4, 16))[None]
    released_content["predictor"]["module.predictor_pos_embed"] = official.sincos_2d(24, (4, 16))[None]
    assert read_encoder(saved(released_content), num_heads=HEADS).architecture.image_size == (32, 128)


def test_the_fixture_is_what_its_json_says(fixtures, released):
    meta = json.loads((fixtures / "released_layout.json").read_text())
    shape = read_encoder(released, num_heads=HEADS).architecture
    assert (shape.embed_dim, shape.depth, shape.num_heads) == (meta["embed_dim"], meta["depth"], meta["num_heads"])
    assert math.prod(shape.grid) == (meta["img_size"] // meta["patch_size"]) ** 2
