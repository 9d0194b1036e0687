"""The functions of ``import jepa_kit``: what they mean, and what they refuse."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import jepa_kit
from jepa_kit.api.configs import checked_config
from jepa_kit.config import ConfigError, config_from_dict, load_config
from jepa_kit.engine.logging.telemetry import read_metrics
from jepa_kit.engine.schedules import Hyper
from jepa_kit.engine.step import train_step
from jepa_kit.evaluation.tables.rows import Row
from jepa_kit.plotting import Figure
from jepa_kit.recipe import Recipe
from jepa_kit.structures import Progress

NAMES = ["build", "evaluate", "list_configs", "list_parts", "load_encoder", "plot_curves", "plot_masks", "plot_patches"]
SMALL = {
    "data": {"image_size": 32, "num_workers": 0},
    "encoder": {"depth": 2, "patch_size": 4},
    "predictor": {"depth": 1},
    "optim": {"warmup_epochs": 0},
}
RUN = {"batch_size": 8, "epochs": 2, "device": "cpu", "precision": "float32", "log_every": 1}


class Blobs(Dataset[tuple[torch.Tensor, int]]):
    """24 images whose left or right half is bright, with their labels, as a data set of torchvision."""

    def __init__(self, seed: int = 0, count: int = 24) -> None:
        rng = np.random.default_rng(seed)
        self.labels = [k % 2 for k in range(count)]
        self.images = torch.from_numpy(rng.integers(0, 64, (count, 3, 40, 36), dtype=np.uint8))
        for image, label in zip(self.images, self.labels, strict=True):
            image[..., 18 * label : 18 * label + 18] += 150

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.images[i], self.labels[i]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps on ``Blobs``, with a checkpoint after each third."""
    output = tmp_path_factory.mktemp("api") / "run"
    options = {"train": RUN | {"output_dir": output}, "checkpoint": {"every": 3, "keep": 9}}
    return jepa_kit.train("ijepa/quickstart", images=Blobs(), **SMALL, **options)


def test_import_is_cheap_and_names_are_listed() -> None:
    code = "import jepa_kit, sys; print(sorted({'torch', 'numpy', 'yaml'} & sys.modules.keys()), dir(jepa_kit))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("[] [")
    assert all(f"'{name}'" in out for name in [*NAMES, "train", "__version__"])
    assert (Path(jepa_kit.__file__).parent / "py.typed").exists()
    with pytest.raises(AttributeError, match="module 'jepa_kit' has no attribute 'bild'"):
        jepa_kit.bild  # noqa: B018


@pytest.mark.parametrize("name", [*NAMES, "train"])
def test_every_function_is_typed_and_has_an_example_on_the_page(name: str) -> None:
    function = getattr(jepa_kit, name)
    hints, parameters = inspect.get_annotations(function), inspect.signature(function).parameters
    assert {*parameters, "return"} <= hints.keys()
    assert inspect.getdoc(function)
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    assert any(f"jepa_kit.{name}(" in code for code in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S))


def test_overrides_mean_what_they_mean_on_a_command_line(tmp_path: Path) -> None:
    texts = ["masker={name: random, ratio: 0.5}", "optim.lr=1e-05", "train.output_dir=a/b", "data.image_size=[32, 48]"]
    wanted = load_config("ijepa/quickstart", texts)
    overrides = {
        "masker": {"name": "random", "ratio": 0.5},
        "optim.lr": 1e-5,
        "train": {"output_dir": Path("a/b")},
        "data": {"image_size": (32, 48)},
    }
    assert checked_config("ijepa/quickstart", overrides) == wanted
    (tmp_path / "own.yaml").write_text(wanted.to_yaml())
    for same in (wanted, wanted.to_dict(), tmp_path / "own.yaml", str(tmp_path / "own.yaml")):
        assert checked_config(same, {}) == wanted
        assert checked_config(same, {"optim.lr": 0.5}).optim.lr == 0.5
    text = "a 'quoted' # \"text\": [1, ü]\\"
    assert checked_config(wanted, {"train.output_dir": text}).train.output_dir == text
    assert checked_config(wanted, {"optim": {"clip_grad": None}}).optim.clip_grad is None


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"train": {"epoch": 3}}, ConfigError, "train.epoch is not an option; did you mean 'epochs'?"),
        ({"mask": {}}, ConfigError, "mask is neither a slot nor a section"),
        ({"optim": {"lr": "fast"}}, ConfigError, "optim.lr (='fast') must be"),
        ({"optim": {"lr": torch.ones(2)}}, TypeError, "override optim (={'lr': tensor([1., 1.])}) must be numbers"),
        ({"encoder": {"depth": 0}}, ConfigError, "encoder: depth (=0) must be"),
    ],
)
def test_mistakes_name_the_option(overrides: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        jepa_kit.build("ijepa/quickstart", **overrides)


def test_lists() -> None:
    configs = jepa_kit.list_configs()
    assert {"ijepa/in1k_vits16", "mae/quick"} <= {*configs}
    assert jepa_kit.list_configs("mae/*") == [name for name in configs if name.startswith("mae/")]
    for name in configs[:3]:
        assert load_config(name)
    parts = jepa_kit.list_parts()
    assert parts["masker"] == jepa_kit.list_parts("masker")
    assert {"knn"} <= {*jepa_kit.list_parts("protocol")}
    assert {"recipe", "encoder", "loss", "transform"} <= parts.keys()
    with pytest.raises(ValueError, match=r"kind \(='maskers'\) must be one of recipe, .*; did you mean 'masker'"):
        jepa_kit.list_parts("maskers")


def built(**overrides: object) -> Recipe:
    torch.manual_seed(0)
    return jepa_kit.build("ijepa/quickstart", **SMALL, **overrides)


def test_a_loop_of_five_lines_is_the_step_of_a_run() -> None:
    """The same losses and weights as the engine's step, with the images that it normalises."""
    ours, theirs = built(), built()
    batches = Blobs().images[..., :32, :32].unflatten(0, (3, 8))
    groups = [{"params": recipe.parameters(), "decayed": True} for recipe in (ours, theirs)]
    optimizers = [torch.optim.AdamW([group], lr=1e-3, weight_decay=0.1, fused=True) for group in groups]
    losses = []
    for step, images in enumerate(batches):
        out = ours.forward_images(images, step=step, steps=3)
        out.loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        ours.update_target(ours.momentum(step / 3))
        update = train_step(
            theirs,
            optimizers[1],
            Hyper(1e-3, 0.1, theirs.momentum(step / 3)),
            theirs.views(images, step=step),
            progress=Progress(step, step / 3),
        )
        losses.append(out.loss.item())
        assert out.loss.equal(update.loss)
    assert len({*losses}) == 3
    for name, value in ours.state_dict().items():
        assert value.equal(theirs.state_dict()[name]), name


def test_views() -> None:
    recipe = built()
    images = Blobs().images[:4, :, :32, :32]
    (first,), (again,), (later,) = (recipe.views(images, step=step) for step in (0, 0, 1))
    assert first.masks is not None
    assert again.masks is not None
    assert later.masks is not None
    assert first.masks.context.index.equal(again.masks.context.index)
    assert not first.masks.context.index.equal(later.masks.context.index)
    data = recipe.config.data  # type: ignore[union-attr]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (data.mean, data.std))
    torch.testing.assert_close(first.images, (images / 255 - mean) / std)
    assert recipe.views(first.images)[0].images is first.images
    assert recipe.masker is recipe.maskers[0]
    with pytest.raises(ValueError, match=r"images \(=2 tensors\) must be one for each of the 1 views"):
        recipe.views(images, images)
    with pytest.raises(ValueError, match=r"step \(=3\) must be from 0 to steps - 1 \(=2\)"):
        recipe.forward_images(images, step=3, steps=3)
    recipe.config = None
    with pytest.raises(ValueError, match=r"make the recipe with jepa_kit\.build"):
        recipe.views(images)


@pytest.mark.parametrize("config", ["simclr/quick", "lejepa/quick", "mae/quick", "ibot/quick"])
def test_other_recipes_take_a_tensor_for_each_view(config: str) -> None:
    recipe = jepa_kit.build(config, encoder={"depth": 1})
    sizes = recipe.config.data.view_sizes  # type: ignore[union-attr]
    out = recipe.forward_images(*(torch.randn(4, 3, *size) for size in sizes), step=0, steps=10)
    out.loss.backward()
    assert torch.isfinite(out.loss)


def test_recipes_with_actions_are_refused() -> None:
    recipe = jepa_kit.build("iwm/quick")
    images = [torch.zeros(2, 3, *size) for size in recipe.config.data.view_sizes]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"data\.views asks for actions, which images \(=tensors\) lack"):
        recipe.views(*images)


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    file = sorted(folder.glob("checkpoint_*.pt"))[-1]
    weights: dict[str, torch.Tensor] = torch.load(file, weights_only=True)["model"]
    return weights


def test_a_run_on_a_data_set_resumes_exactly(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_config(folder).data.shards is None
    files = sorted(folder.glob("checkpoint_*.pt"))
    assert [int(file.stem[-8:]) for file in files] == [3, 6]
    for name in (files[0].name, "config.yaml", "run.json"):
        shutil.copy(folder / name, tmp_path)
    with pytest.raises(ValueError, match=r"had another data set than .* data set 0 differs: Blobs"):
        jepa_kit.train(tmp_path, images=Blobs(seed=1), resume=True)
    assert jepa_kit.train(tmp_path, images=Blobs(), resume=True) == tmp_path
    assert "compared by their number, labels and 32 images" in capsys.readouterr().out
    ours, theirs = last_weights(tmp_path), last_weights(folder)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert [r["step"] for r in read_metrics(tmp_path)] == [3, 4, 5]


def test_evaluation(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows for a data set and for a folder of its images, of a run, a recipe and a loaded encoder."""
    parts = {"train": Blobs(), "test": Blobs(seed=2, count=12)}
    for part, data in parts.items():
        for i, (image, label) in enumerate(data):
            path = tmp_path / part / str(label) / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    protocol = {"name": "knn", "neighbours": [3]}
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pandas", None)
        rows = jepa_kit.evaluate(folder, protocol, **parts, device="cpu")
    assert isinstance(rows, list)
    assert re.search(r"\| knn +\| pixels +\| 768 +\| 100\.0 ± 0\.0 \|", str(rows))
    assert [(row.network, row.label, row.n_train, row.n_test) for row in rows] == [
        (network, "class", 24, 12) for network in ("target", "untrained", "pixels")
    ]
    assert rows[2].accuracy == 1.0
    pandas = pytest.importorskip("pandas")
    of_files = jepa_kit.evaluate(folder, [protocol], train=tmp_path / "train", device="cpu")
    assert isinstance(of_files, pandas.DataFrame)
    assert {*of_files.columns} == {*typing.get_type_hints(Row)}
    assert of_files.columns[0] == "network"
    assert of_files["accuracy"].tolist() == [row.accuracy for row in rows]
    encoder, baselines = jepa_kit.load_encoder(folder), ["pixels", "patches", "untrained"]
    of_encoder = jepa_kit.evaluate(encoder, protocol, **parts, device="cpu", baselines=baselines)
    found = dict(zip(of_encoder["network"], of_encoder["accuracy"], strict=True))
    assert found.keys() == {"target", *baselines}
    assert (found["target"], found["pixels"]) == (rows[0].accuracy, 1.0)
    of_recipe = jepa_kit.evaluate(built(), "knn", **parts, device="cpu", baselines=[], which="context")
    assert of_recipe["network"].tolist() == ["context"]


def test_what_evaluate_refuses(folder: Path) -> None:
    with pytest.raises(ValueError, match="train must name a folder of shards: the run's config has none"):
        jepa_kit.evaluate(folder, "knn")
    with pytest.raises(ValueError, match="test must name a folder of shards: there is no test or val beside Blobs"):
        jepa_kit.evaluate(folder, "knn", train=Blobs())
    with pytest.raises(ValueError, match=r"baselines \(='pixel'\) must be of untrained, pixels, patches"):
        jepa_kit.evaluate(jepa_kit.load_encoder(folder), "knn", train=Blobs(), test=Blobs(), baselines=["pixel"])
    recipe = built()
    recipe.config = None
    with pytest.raises(ValueError, match=r"must be from jepa_kit\.build"):
        jepa_kit.evaluate(recipe, "knn", train=Blobs(), test=Blobs())
    with pytest.raises(FileNotFoundError):
        jepa_kit.evaluate("nowhere", "knn", train=Blobs(), test=Blobs())


def test_a_list_of_files_is_images_and_one_of_folders_is_shards(folder: Path, tmp_path: Path) -> None:
    paths = []
    for i, (image, label) in enumerate(Blobs(count=16)):
        paths.append(tmp_path / "abc"[label] / f"{i}.png")
        paths[-1].parent.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(paths[-1])
    from jepa_kit.api.data import open_images, training_images

    config = load_config("ijepa/quickstart")
    assert len(open_images(paths, config)) == 16
    assert open_images(paths, None).classes == {"class": ("a", "b")}
    folders = [tmp_path / "a", tmp_path / "b"]
    assert training_images(config, folders) == (checked_config(config, {"data.shards": folders}), None)
    assert len(open_images(folders, config)) == 16
    assert training_images(config, None) == (config, None)


def test_hugging_face(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from jepa_kit.api.data import open_images

    blobs = Blobs(count=6)
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image, _ in blobs]
    kinds = {
        "image": datasets.Image(),
        "other": datasets.Image(),
        "label": datasets.ClassLabel(names=["left", "right"]),
    }
    columns = {"image": images, "other": images, "label": blobs.labels}
    both = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    rows = both.remove_columns("other")
    ours, theirs = open_images(rows, None), open_images(blobs, None)
    assert ours.classes == {"class": ("left", "right")}
    assert ours.labels("class").tolist() == theirs.labels("class").tolist() == blobs.labels
    for i in range(6):
        assert np.array_equal(ours.image(i), theirs.image(i))
    assert ours.image_bytes(0).startswith(b"\x89PNG")  # the bytes of the row, not encoded again
    with pytest.raises(ValueError, match="a IterableDataset\\) must have a length"):
        open_images(rows.to_iterable_dataset(), None)
    with pytest.raises(ValueError, match="a DatasetDict of train\\) must be one data set"):
        open_images(datasets.DatasetDict(train=rows), None)
    with pytest.raises(ValueError, match="must have one column of images: select_columns"):
        open_images(both, None)


def test_figures(folder: Path, tmp_path: Path) -> None:
    images = Blobs().images[:4, :, :32, :32]
    recipe = built()
    for figure in (
        jepa_kit.plot_masks("ijepa/quickstart", **SMALL, count=2),
        jepa_kit.plot_masks(recipe, images, masker={"name": "multiblock"}),
        jepa_kit.plot_masks(recipe, [Image.new("RGB", (50, 40))]),
        jepa_kit.plot_patches({"run": folder, "recipe": recipe, "encoder": jepa_kit.load_encoder(folder)}, images),
        jepa_kit.plot_curves(folder),
    ):
        assert isinstance(figure, Figure)
    assert figure._repr_png_().startswith(b"\x89PNG")
    rows = jepa_kit.plot_patches({"a": recipe, "b": recipe}, images, untrained=False, shown=3)
    assert len(rows.axes) == 9
    assert [axis.get_ylabel().partition("\n")[0] for axis in rows.axes[::3]] == ["image", "a", "b"]


def test_what_figures_refuse(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images \(=\(1, 3, 40, 40\)\) must be of data.image_size \(=\(32, 32\)\)"):
        jepa_kit.plot_masks("ijepa/quickstart", torch.zeros(1, 3, 40, 40, dtype=torch.uint8), **SMALL)
    with pytest.raises(ValueError, match=r"count \(=0\) must be at least 1"):
        jepa_kit.plot_masks("ijepa/quickstart", count=0)
    with pytest.raises(ValueError, match="has no masker"):
        jepa_kit.plot_masks("simclr/quick")
    with pytest.raises(ValueError, match=r"encoder \(=\{\}\) must have at least one"):
        jepa_kit.plot_patches({})
    with pytest.raises(ValueError, match=r"images \(=None\) must be given for an encoder that is not of a run"):
        jepa_kit.plot_patches(jepa_kit.load_encoder(folder))
    with pytest.raises(ValueError, match=r"images \(=\[\]\) must be at least one"):
        jepa_kit.plot_patches(folder, [])
    with pytest.raises(ValueError, match=r"must be a run folder with logged steps: it has no metrics\.jsonl"):
        jepa_kit.plot_curves(tmp_path)


def test_a_mapping_with_every_key_needs_no_name() -> None:
    """``build`` of a resolved config has the weights of ``build`` of its name."""
    whole = built().config.to_dict()  # type: ignore[union-attr]
    torch.manual_seed(0)
    again = jepa_kit.build(whole)
    assert config_from_dict(whole) == again.config
    assert all(x.equal(y) for x, y in zip(built().parameters(), again.parameters(), strict=True))
