"""Pictures of a run: attention against the fused kernels, guesses against numpy, decoder, page and tools."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from jepa_kit.config import config_from_dict
from jepa_kit.data.transforms import normalize
from jepa_kit.encoders import ViT
from jepa_kit.engine.build import open_shards
from jepa_kit.engine.checkpoint.format import Checkpoint, save_checkpoint
from jepa_kit.evaluation.features import load_run
from jepa_kit.evaluation.pictures.decoder import (
    Decoder,
    energy_score,
    image_scale,
    patchify,
    r_squared,
    to_pixels,
    train_decoder,
    unpatchify,
)
from jepa_kit.evaluation.pictures.hidden_block import middle_block
from jepa_kit.evaluation.pictures.maps import attention_weights, guesses
from jepa_kit.evaluation.pictures.material import divided, gather
from jepa_kit.evaluation.pictures.run_page import draw_run
from jepa_kit.from_config import build_recipe
from jepa_kit.maskers import Random
from jepa_kit.structures import PatchSets, View

TOOLS = Path(__file__).parents[3] / "tools"
FILES = [
    "attention.png",
    "decoder.png",
    "energy.png",
    "page.png",
    "patch_pca.png",
    "predictor_guess.png",
    "visualize.json",
]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


@pytest.mark.parametrize("block", [-1, 0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": True, "registers": 2, "positions": "rotary"},
        {"class_token": True, "relative_bias": "per_block"},
        {"class_token": True, "causal": True},
    ],
)
def test_attention_agrees_with_the_fused_kernel(block, options):
    torch.manual_seed(0)
    encoder = ViT(image_size=(16, 24), patch_size=4, embed_dim=24, depth=2, num_heads=3, drop_path=0.5, **options)
    nn.init.normal_(encoder.blocks[block].attn.qkv.weight, std=0.5)
    for table in [] if encoder.relative is None else encoder.relative.tables:
        nn.init.normal_(table)
    n = 24 + encoder.num_prefix
    encoder.train()
    images = torch.randn(5, 3, 16, 24)
    seen = {}
    attention = encoder.blocks[block].attn
    attention.qkv.register_forward_hook(lambda m, given, out: seen.update(qkv=out))
    attention.proj.register_forward_hook(lambda m, given, out: seen.update(mixed=given[0]))
    weights = attention_weights(encoder, images, block)
    assert weights.shape == (5, 3, n, n)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, 3, n))
    v = seen["qkv"][: 5 * n].unflatten(-1, (3, 3, 8))[:, 2].unflatten(0, (5, n)).transpose(1, 2)  # [5, 3, n, 8]
    mixed = (weights @ v).transpose(1, 2).flatten(2).flatten(0, 1)
    torch.testing.assert_close(mixed, seen["mixed"][: len(mixed)], rtol=1e-4, atol=1e-5)
    assert encoder.training
    assert len(attention.qkv._forward_hooks) == 1  # the test's own


def test_attention_needs_blocks():
    with pytest.raises(ValueError) as error:
        attention_weights(nn.Linear(2, 2), torch.zeros(1, 3, 8, 8))
    assert str(error.value) == "encoder (=Linear) must have blocks with attn.qkv, as 'vit' has"


def test_a_guess_is_ranked_among_all_patches(tiny_run):
    jepa = tiny_run[1]
    nn.init.normal_(jepa.predictor.proj.weight)
    images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    masks = Random(grid=(4, 4), ratio=0.5)(np.arange(20), seed=0, epoch=0)
    with torch.no_grad():
        x = normalize(images, MEAN, STD)
        targets = jepa.target(x, PatchSets.full(20, 16), jepa.target_encoder).view(20, 16, 16).double().numpy()
        predictions = jepa.predict(View(x, masks)).prediction.double().numpy()
    for guess in guesses(jepa, x, masks, [3, 11], nearest=4):
        rows = [
            k
            for k, (i, p) in enumerate(
                zip(masks.targets.image_of_token.tolist(), masks.targets.index.tolist(), strict=True)
            )
            if (i, p) == (guess.image, guess.patch)
        ]
        centre = targets.reshape(-1, 16).mean(0)
        wanted = predictions[rows[0]] - centre
        cosine = (targets - centre) @ wanted / np.linalg.norm(targets - centre, axis=-1) / np.linalg.norm(wanted)
        np.testing.assert_allclose(guess.cosine.numpy(), cosine, atol=1e-5)
        assert guess.rank == 1 + (cosine > cosine[guess.image, guess.patch]).sum()
        assert guess.total == 320
        best = [i for i in np.argsort(-cosine.max(1)) if i != guess.image][:4]
        assert guess.nearest == [(i, int(cosine[i].argmax())) for i in best]
        assert guess.context.tolist() == masks.context.split()[guess.image].tolist()
        hidden = [
            p
            for i, p in zip(masks.targets.image_of_token.tolist(), masks.targets.index.tolist(), strict=True)
            if i == guess.image
        ]
        far = np.square(targets - targets.mean(0)).sum(-1)[guess.image]
        assert guess.patch == max(hidden, key=lambda p: far[p])


def test_patches_and_back():
    images = torch.randn(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    assert torch.equal(patches[1, 4], images[1, :, 4:8, 4:8].reshape(-1))
    assert torch.equal(unpatchify(patches, (2, 3)), images)


def test_normalised_images_to_pixels():
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(to_pixels(normalize(images, MEAN, STD), MEAN, STD), images)
    assert to_pixels(torch.full((1, 3, 1, 1), 99.0), MEAN, STD).flatten().tolist() == [255, 255, 255]
    x = normalize(images, MEAN, STD)
    centre, deviation = image_scale(x, whole=True)
    left = ((x - centre) / deviation).numpy().astype(np.float64)
    np.testing.assert_allclose(left.mean((2, 3)), 0, atol=1e-6)
    assert np.all(left.std((1, 2, 3)) < 1)
    assert [float(v.mean()) for v in image_scale(x, whole=False)] == [0.0, 1.0]


def test_energy_score():
    first, second, truth = torch.randn(3, 4, 5, 6, dtype=torch.float64).numpy()

    def norm(a, b):
        return np.sqrt(np.square(a - b).sum((1, 2)))

    expected = np.mean(norm(first, truth) / 2 + norm(second, truth) / 2 - norm(first, second) / 2)
    draws = torch.from_numpy(first), torch.from_numpy(second)
    assert float(energy_score(draws, torch.from_numpy(truth))) == pytest.approx(expected)


def test_a_decoder_draws_what_tokens_determine():
    random = torch.Generator().manual_seed(0)
    tokens = torch.randn(64, 4, 6, generator=random)
    pixels = tokens @ torch.randn(6, 12, generator=random)
    state = torch.random.get_rng_state()
    decoder = train_decoder(tokens[:48], pixels[:48], steps=150, hidden=32)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert r_squared(decoder, tokens[48:], pixels[48:]) > 0.7
    assert r_squared(decoder, tokens[48:].flip(0), pixels[48:]) < 0.2
    again = train_decoder(tokens[:48], pixels[:48], steps=150, hidden=32)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in decoder.state_dict().items())


def test_draws_vary_in_what_tokens_do_not_determine():
    """Images are all +1 or all -1, and tokens are constant: draws are one or the other, not 0."""
    signs = torch.randint(0, 2, (256, 1, 1), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    pixels = signs.expand(256, 4, 12).contiguous()
    decoder = train_decoder(torch.zeros(256, 4, 2), pixels, steps=300, hidden=32)
    draws = decoder.draw(torch.zeros(200, 4, 2), torch.Generator().manual_seed(1)).mean((1, 2))
    assert 0.3 < float((draws > 0).float().mean()) < 0.7
    assert float(draws.abs().median()) > 0.6


def test_rejected_arguments_of_a_decoder():
    for tokens, options, message in (
        (torch.zeros(2, 3, 4), {}, "tokens (2, 3, 4) and pixels (2, 4, 12) must be of the same patches"),
        (torch.zeros(2, 4, 4), {"steps": 0}, "steps (=0) must be at least 1"),
        (torch.zeros(2, 4, 4), {"batch_size": 0}, "batch_size (=0) must be at least 1"),
    ):
        with pytest.raises(ValueError) as error:
            train_decoder(tokens, torch.zeros(2, 4, 12), **options)
        assert str(error.value) == message
    assert Decoder(dim=4, patch_size=2)(torch.zeros(2, 5, 4), torch.zeros(2, 5, 16)).shape == (2, 5, 12)


def test_the_middle_block():
    assert middle_block((4, 4)).tolist() == [5, 6, 9, 10]
    assert len(middle_block((14, 14))) == 64
    assert middle_block((2, 3)).tolist() == [0]


def test_the_page_of_a_run(tiny_run, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("jepa_kit.evaluation.pictures.sections.DPI", 30)
    run = load_run(tiny_run[0])
    material = gather(run, scenes[0], images=32, others=64, device=torch.device("cpu"))
    content = draw_run(material, tmp_path / "a", name="tiny", steps=2)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == FILES
    assert json.loads((tmp_path / "a" / "visualize.json").read_text()) == json.loads(json.dumps(content))
    assert content["patches"] == 32 * 16
    assert set(content["decoder_explains"]) == {"targets", "predictions", "positions"}
    sizes = {}
    for name in FILES[:-1]:
        with Image.open(tmp_path / "a" / name) as picture:
            sizes[name] = picture.size
    assert len({width for width, _ in sizes.values()}) == 1
    assert sizes["page.png"][1] > sum(height for name, (_, height) in sizes.items() if name != "page.png")


def test_few_images_make_smaller_pictures(tiny_run, scenes):
    messages = []
    run = load_run(tiny_run[0])
    material = gather(run, scenes[0], images=256, others=1024, device=torch.device("cpu"), log=messages.append)
    assert (len(material.images), len(material.others)) == (64, 32)
    assert messages == [f"{scenes[0].path} has 96 images: 64 for pictures, 32 to train the decoder"]


@pytest.mark.parametrize(
    ("samples", "images", "others", "expected"),
    [(2000, 256, 1024, (256, 1024)), (96, 33, 64, (33, 63)), (1000, 256, 1024, (256, 744)), (24, 256, 1024, (16, 8))],
)
def test_how_images_are_divided(samples, images, others, expected):
    assert divided(samples, images, others) == expected


def test_too_few_images():
    with pytest.raises(ValueError, match="photos has 23 images; pictures of a run need at least 24"):
        divided(23, 256, 1024, "photos")


def tool(name):
    return importlib.import_module(f"jepa_kit.tools.{name}")


def test_visualize(tiny_run, scenes, tmp_path, monkeypatch, capsys):
    given = {}

    def draw(material, folder, *, name, steps, log):
        given.update(folder=folder, name=name, steps=steps, images=len(material.images), others=len(material.others))
        return {"verdict": "healthy", "reason": "it is", "files": ["page.png"]}

    monkeypatch.setattr("jepa_kit.evaluation.pictures.run_page.draw_run", draw)
    few = ["--shards", scenes[0].path, "--images", "32", "--decoder-images", "64", "--decoder-steps", "7"]
    assert tool("visualize").main(["--checkpoint", str(tiny_run[0] / "checkpoint_00000002.pt"), *few]) == 0
    folder = tiny_run[0] / "pictures"
    name = f"{tiny_run[0].parent.name}/run"
    assert given == {"folder": folder, "name": name, "steps": 7, "images": 32, "others": 64}
    assert capsys.readouterr().out == f"healthy: it is\n{folder / 'page.png'}\n"


def test_health(tiny_run, scenes, tmp_path, capsys):
    names = [str(tiny_run[0] / "checkpoint_00000002.pt"), str(tiny_run[0])]
    file = tmp_path / "out" / "health.json"
    options = ["--shards", scenes[1].path, "--images", "32", "--masks", "2", "--encoder", "context"]
    assert tool("health").main(["--checkpoint", *names, *options, "--output", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("images under 2 masks, context encoder\n")
    assert [line.split() for line in printed.splitlines()[2:4]] == [
        ["images", "32", "32"],
        ["width", "of", "a", "token", "16", "16"],
    ]
    assert "step 2        step 5\n" in printed
    assert f"{names[1]}, step 5: not learned: targets are sound" in printed
    content = json.loads(file.read_text())
    assert [entry["step"] for entry in content["health"]] == [2, 5]
    assert content["health"][0]["figures"]["lidar"] > 0


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("visualize", ["--images", "31"], "--images (=31) must be at least 32"),
        ("visualize", ["--decoder-steps", "0"], "--decoder-steps (=0) must be at least 1"),
        (
            "visualize",
            ["--checkpoint", "s3://a/b"],
            "--output must name a folder: --checkpoint (='s3://a/b') is not in a folder",
        ),
        ("visualize", [], "--shards must name a folder of shards: the run's config has none (data.shards is null)"),
        ("health", [], "--shards must name a folder of shards: the run's config has none (data.shards is null)"),
        ("health", ["--shards", "SCENES", "--images", "15"], "--images (=15) must be at least 16 for meaningful"),
        ("health", ["--shards", "SCENES", "--images", "-5"], "--images (=-5) must be at least 16 for meaningful"),
        (
            "health",
            ["--shards", "SCENES", "--output", "SCENES"],
            "--output (='SCENES') must name a file, but is a fold",
        ),
        (
            "health",
            ["--checkpoint", "train.device=cpu"],
            "--checkpoint must name a checkpoint besides",
        ),
        (
            "visualize",
            ["--shards", "SCENES", "--output", "SCENES/index.json/a"],
            "--output (='SCENES/index.json/a/page",
        ),
    ],
)
def test_mistakes_exit_with_2(tiny_run, scenes, name, arguments, message, capsys):
    arguments = [a.replace("SCENES", scenes[0].path) for a in arguments]
    assert tool(name).main(["--checkpoint", str(tiny_run[0]), *arguments]) == 2
    assert f"{name}.py: {message.replace('SCENES', scenes[0].path)}" in capsys.readouterr().err


@pytest.mark.parametrize("before", [True, False])
def test_health_with_another_device(tiny_config, tmp_path, scenes, capsys, before):
    """The config's GPU is missing; a folder whose name looks like an override is a folder."""
    folder = tmp_path / "train.device=cpu"
    folder.mkdir()
    torch.manual_seed(0)
    config = config_from_dict(tiny_config.to_dict(), ["train.device=cuda:99"])
    jepa = build_recipe(config)
    held = Checkpoint(step=5, model=jepa.state_dict(), optimizer={}, config=config.to_dict(), versions={}, data={})
    save_checkpoint(folder, held)
    command = ["--checkpoint", str(folder), "--shards", scenes[1].path, "--images", "16"]
    assert tool("health").main(command) == 2
    assert "cuda:99" in capsys.readouterr().err
    override = ["train.device=cpu"]
    assert tool("health").main(override + command if before else [*command[:2], *override, *command[2:]]) == 0
    assert "step 5: not learned" in capsys.readouterr().out


def test_health_of_networks_that_diverged(tiny_run, scenes, tmp_path, capsys):
    folder, jepa = tiny_run
    torch.nn.init.constant_(jepa.predictor.proj.weight, 3e38)  # finite, but sums are not
    held = Checkpoint(
        step=9, model=jepa.state_dict(), optimizer={}, config=load_run(folder).config.to_dict(), versions={}, data={}
    )
    file = save_checkpoint(tmp_path, held)
    few = ["--shards", scenes[0].path, "--images", "32"]
    for name in ("health", "visualize"):
        output = tmp_path / name
        assert tool(name).main(["--checkpoint", str(file), *few, "--output", str(output)]) == 2
        expected = f"{name}.py: predictions must be finite, but the network gives NaN or infinity: it diverged\n"
        assert capsys.readouterr().err.endswith(expected)
        assert not output.exists()


def test_shards_are_opened_and_read_as_the_config_says(tiny_config, tiny_run, scenes, tmp_path, monkeypatch):
    """data.cache and data.retries reach the reader; images of more than data.max_pixels are rejected."""
    options = ["data.max_pixels=300", f"data.cache={tmp_path / 'cache'}", "data.retries=9"]
    config = config_from_dict(tiny_config.to_dict(), options)
    opened = []

    def load(checkpoint, overrides=(), trust_imports=False):
        return load_run(checkpoint)._replace(config=config)

    def spied(config, shards=None):
        opened.append(open_shards(config, shards))
        return opened[-1]

    monkeypatch.setattr("jepa_kit.evaluation.features.load_run", load)
    monkeypatch.setattr("jepa_kit.engine.build.open_shards", spied)
    for name, more in (("health", []), ("visualize", ["--images", "32", "--decoder-images", "64"])):
        arguments = ["--checkpoint", str(tiny_run[0]), "--shards", scenes[0].path, *more]
        assert tool(name).main(arguments) == 2
    assert [dataset._access.retries for dataset in opened] == [9, 9]
    run = load(tiny_run[0])
    with pytest.raises(ValueError, match=r"cannot be used: 16 x 20 pixels are more than max_pixels \(=300\) allows"):
        gather(run, scenes[0], images=32, others=64, device=torch.device("cpu"))
