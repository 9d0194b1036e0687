"""The page as a file, the tool that writes it, and the page in a browser."""

import base64
import json
import re
import subprocess

import numpy as np
import pytest
import torch
from demo_cases import CHROMIUM, HERE, NODE, STATIC, make_recipe

from jepa_kit.data.transforms import normalize
from jepa_kit.demo import page as demo_page
from jepa_kit.demo.page import SCRIPTS, prepare_network, script
from jepa_kit.demo.tensors import TensorBlock
from jepa_kit.engine.checkpoint.format import Checkpoint, save_checkpoint
from jepa_kit.evaluation.features import LoadedRun, load_run
from jepa_kit.structures import MaskBatch, PatchSets, View
from jepa_kit.tools import demo

FEW = ["--num-images", "8", "--decoder-images", "16", "--decoder-steps", "3"]


@pytest.fixture(scope="module")
def html(run_folder, scenes, tmp_path_factory):
    """A page that the tool wrote."""
    output = tmp_path_factory.mktemp("page") / "new" / "demo.html"
    arguments = ["--images", str(scenes), "--output", str(output), "--title", "</script> & co", *FEW]
    assert demo.main([str(run_folder[0]), *arguments]) == 0
    return output


def part(html, name):
    return re.search(rf'<script [^>]*id="{name}">(.*?)</script>', html.read_text(), re.DOTALL)[1]


def shown_images(html):
    """Return the images of a page, [B, 3, 24, 32] uint8."""
    kind, offset, rows, columns = json.loads(part(html, "data"))["tensors"]["images"]
    assert kind == "u8"
    tensors = np.frombuffer(base64.b64decode(part(html, "tensors")), dtype=np.uint8)
    return torch.from_numpy(tensors[offset : offset + rows * columns].copy()).view(rows, 3, 24, 32)


def test_integers_of_weights_are_close_and_zero_rows_stay_zero():
    block, weights = TensorBlock(), torch.randn(5, 7) * torch.tensor([1e-6, 1, 100, 0, 3])[:, None]
    block.add("odd", torch.arange(3, dtype=torch.uint8))
    block.add("weights", weights)
    kind, offset, rows, columns = block.entries["weights"]
    assert (kind, offset, rows, columns) == ("i16", 4, 5, 7)
    data = block.to_bytes()[offset:]
    scales, integers = np.frombuffer(data[:20], "<f4"), np.frombuffer(data[20:90], "<i2").reshape(5, 7)
    error = np.abs(integers * scales[:, None] - weights.numpy()).max(1)
    assert (error <= weights.abs().amax(1).numpy() / 65_534 * 1.01).all()
    assert len(block) == len(block.to_bytes()) == 4 + 20 + 72


def test_the_script_has_every_module_and_no_import(tmp_path):
    assert {*SCRIPTS} == {file.name for file in STATIC.glob("*.js")}
    text = script()
    assert not re.search(r"^(?:import|export)\b", text, re.MULTILINE)
    if NODE is None:
        pytest.skip("needs Node.js to parse the script")
    (tmp_path / "script.mjs").write_text(text)  # names that two modules declare would be an error
    done = subprocess.run([NODE, "--check", tmp_path / "script.mjs"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_page_is_one_file_without_a_network(html):
    text = html.read_text()
    assert len(text) < 5_000_000
    assert "default-src 'none'" in text
    without_tensors = text.replace(part(html, "tensors"), "")
    for loads in ("://", "src=", "<link", "@import", "url(", "fetch(", "XMLHttpRequest", "WebSocket", "import("):
        assert loads not in without_tensors, loads
    assert text.count("</script>") == 3  # that of the title does not end the data
    assert json.loads(part(html, "data"))["title"] == "</script> & co"
    assert shown_images(html).float().std() > 10


def test_a_network_that_is_too_large_is_refused_with_its_size(tiny_config):
    config = tiny_config("encoder.embed_dim=192", "encoder.depth=4", "encoder.num_heads=4")
    with pytest.raises(ValueError) as error:
        prepare_network(LoadedRun(config, make_recipe(config), 1), 24)
    weights = 2 * 1_786_944 * 2 * 4 / 3 / 1e6  # two encoders, two bytes a weight, four characters for three bytes
    message = str(error.value)
    found = re.match(r"the page would have (\S+) MB, (\S+) of them weights and (\S+) the 24 images; ", message)
    assert found is not None
    assert float(found[2]) == pytest.approx(weights, rel=0.03)
    assert float(found[3]) == pytest.approx(24 * 24 * 32 * 3 * 4 / 3 / 1e6, abs=0.06)
    assert message.endswith("at most 5 MB are allowed: take a smaller network, or fewer images with --num-images")


def test_a_page_that_grows_too_large_is_not_written(run_folder, scenes, tmp_path, monkeypatch, capsys):
    network = prepare_network(load_run(run_folder[0]), 8)
    monkeypatch.setattr(demo_page, "LIMIT", 2 * len(network.block) + 30_000)  # enough for weights and images
    output = tmp_path / "demo.html"
    assert demo.main([str(run_folder[0]), "--images", str(scenes), "--output", str(output), *FEW]) == 2
    assert re.search(r"demo.py: the page would have 0\.\d MB, .* the 8 images; at most", capsys.readouterr().err)
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-images", "7"], "--num-images (=7) must be at least 8"),
        (["--decoder-images", "15"], "--decoder-images (=15) must be at least 16"),
        (["--decoder-steps", "0"], "--decoder-steps (=0) must be at least 1"),
        (["--output", "."], "--output (='.') must name a file, but is a folder"),
    ],
)
def test_mistakes_in_the_command(run_folder, scenes, capsys, arguments, message):
    assert demo.main([str(run_folder[0]), "--images", str(scenes), *arguments]) == 2
    assert capsys.readouterr().err == f"demo.py: {message}\n"


@pytest.mark.parametrize("checkpoint", ["https://example.org/run.pt", "reference:ijepa_scenes"])
def test_a_checkpoint_of_others_needs_an_output(capsys, checkpoint):
    assert demo.main([checkpoint]) == 2
    message = f"--output must name a file: {checkpoint!r} is in no folder of yours"
    assert message in capsys.readouterr().err


def test_a_run_without_data_needs_images(run_folder, capsys, tmp_path):
    assert demo.main([str(run_folder[0]), "--output", str(tmp_path / "demo.html"), *FEW]) == 2
    assert "--images must name a folder of shards: the run's config has none" in capsys.readouterr().err


OTHER_MASKERS = {
    "multigroup": "target_scale: [[0.1, 0.1], [0.2, 0.2]]",
    "mixture": "maskers: [{name: random}, {name: block}]",
    "subset": "masker: {name: random}, fraction: 0.5",
}


@pytest.mark.parametrize("name", OTHER_MASKERS)
def test_a_masker_that_the_page_does_not_draw_is_named(tiny_config, scenes, tmp_path, capsys, name):
    config = tiny_config(f"masker={{name: {name}, {OTHER_MASKERS[name]}}}")
    kept = {"data": {"samples": 8, "digest": ""}, "versions": {}, "optimizer": {}}
    save_checkpoint(
        tmp_path, Checkpoint(step=3, model=make_recipe(config).state_dict(), config=config.to_dict(), **kept)
    )
    assert demo.main([str(tmp_path), "--images", str(scenes), *FEW]) == 0
    assert (
        f"note: the page does not draw the masker of the run (={name!r}), only multiblock, block, random, rasterized, "
        "blockwise, inverse_block, kept_block, causal\n"
    ) in capsys.readouterr().err
    assert json.loads(part(tmp_path / "demo.html", "data"))["masker"]["name"] == name


def masks_of(cells):
    """Return the context and the targets that the cells of the page are labelled with."""
    context, targets = [], {}
    for patch, label in enumerate(cells):
        place, what = re.fullmatch(r"(row \d+, column \d+), (.+)", label).groups()
        assert place == f"row {patch // 8 + 1}, column {patch % 8 + 1}"
        if what == "context":
            context.append(patch)
        for number in re.findall(r"\d+", what):
            targets.setdefault(int(number), []).append(patch)
    return context, [targets[k] for k in sorted(targets)]


@pytest.mark.integration
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (on Debian: apt-get install chromium)")
@pytest.mark.skipif(NODE is None, reason="needs Node.js to drive Chromium")
def test_the_page_in_a_browser(html, run_folder):
    command = [NODE, str(HERE / "use_page.mjs"), CHROMIUM, html.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["problems"] == []
    assert {*found["requests"]} == {html.as_uri()}
    steps = {one["step"]: one for one in found["steps"]}

    # whatever is hidden, the energy is that of PyTorch
    images, recipe = normalize(shown_images(html), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), run_folder[1]
    energies = []
    for one in steps.values():
        context, targets = masks_of(one["cells"])
        of = torch.zeros(len(targets), dtype=torch.int64)
        sets = PatchSets.pack([torch.tensor(t) for t in targets], of)
        masks = MaskBatch(PatchSets.pack([torch.tensor(context)]), sets, (6, 8), of)
        with torch.no_grad():
            energies.append(float(recipe(View(images[one["image"]][None], masks)).loss))
        assert one["energy"] == pytest.approx(energies[-1], abs=1.5e-3), one["step"]  # of three decimals
        assert one["unnamed"] == []
        assert len(one["selected"]) == 1
        assert "hidden, target" in one["selected"][0]
        assert one["patch"].lower().startswith(one["selected"][0].split(", hidden")[0])
    assert len({*np.round(energies, 4)}) >= 9

    pairs = [("start", "mouse", 0), ("mouse", "keyboard", 1), ("keyboard", "resized", 1), ("phone", "touch", 0)]
    for before, after, target in pairs:
        assert steps[before]["chips"][target] != steps[after]["chips"][target], after
    assert steps["selected"]["selected"] != steps["resized"]["selected"]
    assert steps["image"]["image"] == 2
    assert "13 of 48 patches are never used" in steps["released"]["usage"]
    assert "edges: released, " in steps["released"]["config"]
    assert steps["again"]["cells"] != steps["released"]["cells"]
    assert steps["too much"]["problem"].startswith("These targets can leave fewer than 20 patches of context")
    assert steps["run"]["problem"] == ""
    assert steps["run"]["config"] == "masker: {name: random}"
    assert steps["start"]["background"] != steps["phone"]["background"]
    assert steps["phone"]["widths"] == [390, 390]
