"""tools/eval_net.py as a user meets it: a run is trained, evaluated, and its results are read back."""

import hashlib
import http.server
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from jepa_kit.config import config_from_dict, load_config
from jepa_kit.data.shards.dataset import ShardDataset
from jepa_kit.data.shards.index import brief, identity
from jepa_kit.data.shards.writing import write_index, write_shard
from jepa_kit.data.sources.scenes import Scenes
from jepa_kit.errors import StartError
from jepa_kit.evaluation.protocols.base import PROTOCOLS
from jepa_kit.training import train

TOOL = Path(__file__).parents[2] / "tools" / "eval_net.py"


@pytest.fixture(scope="module")
def tool():
    return importlib.import_module("jepa_kit.tools.eval_net")


def scene_shards(folder, samples, seed, labelled=True):
    source = Scenes(num_scenes=samples, size=(16, 16), seed=seed)
    folder.mkdir(parents=True)
    shard, rows = write_shard(str(folder / "shard-000000.tar"), [source.sample(i) for i in range(samples)])
    write_index(str(folder), [shard], [rows], classes=source.classes if labelled else {}, refused=[], made_by={})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of two steps; its shards, and others to test on beside them."""
    folder = tmp_path_factory.mktemp("eval_net")
    shards = scene_shards(folder / "scenes" / "train", 96, seed=0)
    scene_shards(folder / "scenes" / "val", 32, seed=1)
    scene_shards(folder / "elsewhere", 16, seed=2)
    scene_shards(folder / "unlabelled", 16, seed=3, labelled=False)
    config = {
        "masker": {"name": "multiblock"},
        "encoder": {"name": "vit", "embed_dim": 16, "depth": 4, "num_heads": 2, "patch_size": 4},
        "predictor": {"name": "vit", "width": 8, "depth": 1, "num_heads": 2},
        "target": {"name": "representation"},
        "loss": {"name": "smooth_l1"},
        "target_update": {"name": "ema"},
        "data": {"image_size": 16, "num_workers": 0, "shards": str(shards)},
        "optim": {"warmup_epochs": 0},
        "train": {"batch_size": 48, "epochs": 1, "precision": "float32", "device": "cpu"},
    }
    config["train"]["output_dir"] = str(folder / "run")
    return train(config_from_dict(config))


@pytest.fixture
def refused(tool, capsys):
    """Runs the tool, which must refuse without a traceback; its message."""

    def refuse(*arguments):
        assert tool.main([str(a) for a in arguments]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("eval_net.py: ")
        assert "Traceback" not in printed.err
        assert printed.out == ""
        return printed.err.removeprefix("eval_net.py: ").rstrip("\n")

    return refuse


def test_help_has_examples_and_waits_for_nothing():
    code = f"import sys; sys.argv = ['eval_net.py', '--help']; sys.path[0] = {str(TOOL.parent)!r}; import eval_net\n"
    code += "try: eval_net.main()\nexcept SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 False\n")
    assert "examples:\n  # a run of tools/train_net.py" in done.stdout
    assert "--protocol logistic,knn" in done.stdout


def test_without_a_checkpoint_or_a_protocol(tool, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main([])
    assert stopped.value.code == 2
    assert (
        "the following arguments are required: --checkpoint (or --config-file), --protocol; or --list"
        in capsys.readouterr().err
    )


@pytest.mark.integration
def test_a_run_is_evaluated_from_any_directory(run, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    protocols = ["--protocol", "{name: logistic, subsets: [30%, all]}", "--protocol", "knn"]
    done = subprocess.run(
        [sys.executable, str(TOOL), "--checkpoint", str(run), "--output", "r/a.json", *protocols],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    table = done.stdout.splitlines()
    heads = ["protocol", "features", "width", "count", "distance", "shape"]
    assert [cell.strip() for cell in table[0].split("|")[1:-1]] == heads
    assert [line.split("|")[1:3] for line in table[2:]] == [
        *(
            [f" {title:<13}", f" {network:<15}"]
            for title in ("logistic 30%", "logistic", "knn")
            for network in ("target encoder", "untrained", "pixels", "patches")
        ),
        [" " * 14, f" {'chance':<15}"],
    ]
    content = json.loads((tmp_path / "r" / "a.json").read_text())
    checkpoint = run / "checkpoint_00000002.pt"
    assert content["checkpoint"]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert content["data"]["test"]["shards"] == str(run.parent / "scenes" / "val")
    assert len(content["rows"]) == 36
    assert content["protocols"] == [
        {
            "name": "logistic",
            "subsets": ["30%", "all"],
            "names": None,
            "draws": None,
            "penalties": [10.0, 1.0, 0.1, 0.01, 0.001, 0.0001, 0.00001],
            "whiten": True,
            "cuts": None,
            "holdout": None,
            "max_iter": 1000,
            "pooling": "mean",
        },
        {"name": "knn", "neighbours": [10, 20, 100, 200], "temperature": 0.07, "queries": 10000, "pooling": "mean"},
    ]
    for line in content["rows"]:
        cell = f"{100 * line['accuracy']:.1f} ± {100 * line['standard_error']:.1f}"
        assert any(cell in text for text in table), line


def test_the_same_numbers_again(tool, run, tmp_path):
    command = ["--checkpoint", str(run / "checkpoint_00000002.pt"), "--protocol", "linear", "--label", "count"]
    contents = []
    for name in ("a.json", "b.json"):
        assert tool.main([*command, "--output", str(tmp_path / name)]) == 0
        contents.append(json.loads((tmp_path / name).read_text()))
    for content in contents:
        for row in content["rows"]:
            del row["seconds"]
    assert contents[0] == contents[1]


def test_options_reach_the_evaluation(tool, run, tmp_path, capsys):
    output = tmp_path / "results.json"
    command = ["train.device=cpu", "--checkpoint", str(run), "--protocol", "knn", "--protocol", "linear"]
    command += ["--encoder", "both", "--layers", "last4", "--baselines", "untrained", "--untrained-seed", "9"]
    command += ["--train-shards", str(run.parent / "scenes/train"), "--test-shards", str(run.parent / "elsewhere")]
    command += ["--label", "shape,count", "--seed", "3", "--output", str(output), "--batch-size", "5"]
    assert tool.main(command) == 0
    content = json.loads(output.read_text())
    assert [(r["protocol"], r["network"], r["label"], r["width"]) for r in content["rows"]] == [
        (protocol, network, label, 64)
        for protocol in ("knn", "linear")
        for network in ("target", "context", "untrained")
        for label in ("shape", "count")
    ]
    assert {r["seed"] for r in content["rows"]} == {None, 9}
    assert content["data"]["train"]["samples"] == 96
    assert content["data"]["test"]["samples"] == 16
    assert content["seeds"] == {"run": 0, "protocols": 3}
    assert "context encoder, last4" in capsys.readouterr().out


def test_no_baselines(tool, run, capsys):
    assert tool.main(["--checkpoint", str(run), "--protocol", "knn", "--label", "count", "--baselines", "none"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protocol", "liner"], "protocol.name: 'liner' is not a registered protocol; did you mean 'linear'?"),
        (["--protocol", "linear", "--layers", "last"], "--layers (='last') would do nothing: linear have an option"),
        (["--protocol", "count", "--label", "shape"], "--label (='shape') would do nothing: none of count uses"),
        (
            ["--protocol", "knn", "--untrained-seed", "3", "--baselines", "pixels"],
            "--untrained-seed (=3) would do nothing: --baselines (='pixels') has no untrained network",
        ),
        (["--protocol", "knn", "--label", "colour"], "label (='colour') is not among the labels of"),
        (["--protocol", "knn", "--layers", "first"], "layers (='first') must be 'last', 'last4' (any number) for"),
        (["--protocol", "knn", "--layers", "last9"], "layers (='last9') needs 9 layers, but the encoder has 4"),
        (["--protocol", "knn", "--baselines", "noise"], "baselines (='noise') must be of untrained, pixels, patches."),
        (["--protocol", "knn", "--seed", "-1"], "seed (=-1) must be at least 0"),
        (["--protocol", "knn", "--batch-size", "0"], "batch_size (=0) must be at least 1"),
        (["--protocol", "finetune", "--batch-size", "0"], "batch_size (=0) must be at least 1"),
        (["--protocol", "finetune", "--batch-size", "-5"], "batch_size (=-5) must be at least 1"),
        (["--protocol", "knn", "train.device=tpu"], "device (='tpu') must be 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        (["--protocol", "knn", "--test-shards", "nowhere"], "nowhere"),
        (["--protocol", "knn", "data.max_pixels=9"], "cannot be used: 16 x 16 pixels are more than max_pixels (=9)"),
        (["--protocol", "finetune", "--label", "count", "data.max_pixels=9"], "are more than max_pixels (=9)"),
    ],
)
def test_errors_are_one_line(refused, run, options, message):
    found = refused("--checkpoint", run, *options)
    assert message in found
    assert len(found.splitlines()) == 1


def test_unwritable_outputs_are_rejected_first(refused, run, tmp_path):
    """Before the checkpoint is read: there is none."""
    command = ["--checkpoint", tmp_path / "absent.pt", "--protocol", "knn", "--output"]
    assert refused(*command, tmp_path) == f"--output (='{tmp_path}') must name a file, but is a folder"
    file = run / "config.yaml"
    expected = f"--output (='{file}/a.json') must be in a writable folder, but {file} is not one"
    assert refused(*command, file / "a.json") == expected


def test_test_samples_in_the_training_set_are_reported(tool, run, tmp_path, capsys):
    shards, elsewhere = (str(run.parent / name) for name in ("scenes/train", "elsewhere"))
    command = ["--checkpoint", str(run), "--protocol", "knn", "--label", "count", "--baselines", "none"]
    command += ["--output", str(tmp_path / "a.json"), "--train-shards", shards, "--test-shards"]
    for asked, shared in ((shards, 96), (elsewhere, 0)):
        assert tool.main([*command, asked]) == 0
        told = f"note: {shared} of 96 test samples ({shards}) lie in the training shards ({shards}) too: "
        assert (told in capsys.readouterr().err) == bool(shared)
        assert json.loads((tmp_path / "a.json").read_text())["data"]["test_samples_in_train"] == shared


def test_checkpoints_that_cannot_be_used(refused, run, tmp_path):
    assert "there is no checkpoint" in refused("--checkpoint", tmp_path / "absent.pt", "--protocol", "knn")
    assert "has no checkpoint" in refused("--checkpoint", tmp_path, "--protocol", "knn")
    assert "is not a checkpoint" in refused("--checkpoint", run / "config.yaml", "--protocol", "knn")
    found = refused("--checkpoint", run, "--protocol", "knn", "encoder.embed_dmi=3")
    assert "encoder.embed_dmi is not an option of 'vit'; did you mean 'embed_dim'?" in found
    found = refused("--checkpoint", run, "--protocol", "knn", "encoder.embed_dim=32")
    assert found.startswith("the model does not fit the checkpoint; misshapen: encoder.")


def test_unlabelled_shards(refused, run):
    unlabelled = run.parent / "unlabelled"
    held_out = run.parent / "scenes" / "val"
    found = refused("--checkpoint", run, "--protocol", "knn", "--train-shards", unlabelled, "--test-shards", held_out)
    assert found.startswith(
        f"labels (=[]) must name at least one; the shards in {unlabelled} carry none: images in a sub"
    )
    found = refused("--checkpoint", run, "--protocol", "knn", "--test-shards", unlabelled)
    assert found == f"label (='count') cannot be read: the shards in {unlabelled} are unlabelled"


def test_shards_that_nobody_named(refused, run):
    elsewhere = run.parent / "elsewhere"
    found = refused("--checkpoint", run, "--protocol", "knn", "--train-shards", elsewhere)
    assert found == f"--test-shards must name a folder of shards: there is no test or val beside {elsewhere}"
    found = refused("--checkpoint", run, "--protocol", "knn", "data.shards=null")
    assert found == "--train-shards must name a folder of shards: the run's config has none (data.shards is null)"


def test_results_lie_beside_the_checkpoint(tool, run, capsys):
    command = ["--checkpoint", str(run), "--label", "count", "--baselines", "none"]
    for protocol in ("knn", "{name: knn, neighbours: [5]}", "knn"):
        assert tool.main([*command, "--protocol", protocol]) == 0
    files = sorted((run / "evaluation").glob("step_00000002_*.json"))
    assert f"results: {files[0]}" in capsys.readouterr().err or len(files) >= 2
    asked = [json.loads(file.read_text())["protocols"] for file in files]
    others = {"temperature": 0.07, "queries": 10000, "pooling": "mean"}
    assert asked.count([{"name": "knn", "neighbours": [10, 20, 100, 200], **others}]) == 1
    assert asked.count([{"name": "knn", "neighbours": [5], **others}]) == 1


def test_a_checkpoint_in_shards(tool, run, tmp_path):
    config = load_config(str(run), ["checkpoint.format=sharded", f"train.output_dir={tmp_path / 'run'}"])
    folder = train(config)
    command = ["--protocol", "knn", "--label", "count", "--baselines", "none"]
    checkpoint = folder / "checkpoint_00000002"
    for named in (folder, checkpoint):
        assert tool.main(["--checkpoint", str(named), *command]) == 0
    (file,) = (folder / "evaluation").glob("step_00000002_*.json")  # both calls ask the same
    found = json.loads(file.read_text())["checkpoint"]
    lines = [f"{p.name} {hashlib.sha256(p.read_bytes()).hexdigest()}\n" for p in sorted(checkpoint.iterdir())]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert found.pop("data") == brief(identity(ShardDataset(run.parent / "scenes" / "train").shards))
    assert found == {"file": str(checkpoint), "sha256": digest, "step": 2}


def test_a_remote_checkpoint(tool, run, tmp_path, monkeypatch):
    """Results lie in the run folder, and not beside a copy that goes when the tool ends."""
    folder, copy = tmp_path / "run", tmp_path / "fetched" / "checkpoint_00000002.pt"
    folder.mkdir()
    copy.parent.mkdir()
    shutil.copy(run / copy.name, copy)
    monkeypatch.setattr("jepa_kit.evaluation.features.to_read", lambda named: copy)
    command = ["--protocol", "knn", "--label", "count", "--baselines", "none"]
    assert tool.main(["--checkpoint", str(folder), *command]) == 0
    (file,) = (folder / "evaluation").glob("step_00000002_*.json")
    assert json.loads(file.read_text())["checkpoint"]["file"] == f"{folder} (checkpoint_00000002.pt)"
    address = f"s3://runs/first/{copy.name}"
    assert tool.main(["--checkpoint", address, *command, "--output", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["checkpoint"]["file"] == address


def test_results_of_a_remote_checkpoint_need_an_output(refused):
    assert refused("--checkpoint", "s3://runs/first", "--protocol", "knn") == (
        "--output must name a file: --checkpoint (='s3://runs/first') is not in a folder of yours"
    )


def test_a_config_alone(tool, run, tmp_path, capsys):
    output = tmp_path / "untrained.json"
    command = ["--config-file", str(run / "config.yaml"), "--protocol", "knn", "--label", "count"]
    assert tool.main([*command, "--output", str(output)]) == 0
    assert [line.split("|")[2].strip() for line in capsys.readouterr().out.splitlines()[2:]] == [
        "untrained",
        "pixels",
        "patches",
        "chance",
    ]
    content = json.loads(output.read_text())
    assert content["checkpoint"] is None
    assert tool.main([*command, "--baselines", "pixels"]) == 0
    for options, message in (
        (["--encoder", "both"], "--encoder (='both') would do nothing: --config-file has no trained encoder"),
        (["--baselines", "none"], "--baselines (='none') leaves nothing to evaluate: --config-file has baselines"),
    ):
        assert tool.main([*command, *options]) == 2
        assert message in capsys.readouterr().err


def test_features_are_cached(tool, run, tmp_path, capsys):
    command = ["--checkpoint", str(run), "--protocol", "knn", "--label", "count", "--features", str(tmp_path / "f")]
    tables = []
    for _ in range(2):
        assert tool.main(command) == 0
        tables.append(capsys.readouterr())
    assert tables[0].out == tables[1].out
    assert "all cached in" in tables[1].err
    assert "all cached in" not in tables[0].err


def test_the_list_of_protocols(tool, capsys):
    assert tool.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("knn: Weighted nearest neighbours by cosine")
    assert lines[at + 1 : at + 4] == [
        "    --protocol '{name: knn, neighbours: [5, 20]}'",
        "    neighbours = [10, 20, 100, 200]: values of k to choose from; those above N - 1 are ignored.",
        "    temperature = 0.07: of the weights exp(cosine / temperature), above 0.",
    ]
    assert any(line.startswith("    dataset (needed): that gives the schedule: cifar10") for line in lines)
    assert max(map(len, lines)) <= 120


def test_help_names_every_protocol(tool):
    assert sorted(tool.NAMES.split(", ")) == PROTOCOLS.names()
    assert " ".join(tool.NAMES.split()) in " ".join(tool.parser().format_help().split())


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_remote_shards_are_read_by_the_config(tool, run, tmp_path, capsys):
    folder = run.parent / "scenes"
    command = ["--checkpoint", str(run), "--protocol", "knn", "--label", "count", "--baselines", "none"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        there = ["--train-shards", f"{address}/train", "--test-shards", f"{address}/val"]
        assert tool.main([*command, *there, f"data.cache={tmp_path / 'cache'}"]) == 0
        server.shutdown()
    assert len([file for file in (tmp_path / "cache").rglob("*") if file.suffix == ".tar"]) == 2
    far = capsys.readouterr().out
    assert tool.main(command) == 0
    assert capsys.readouterr().out == far


def test_collectives_have_a_long_timeout(tool, run, monkeypatch, capsys):
    """A question may take hours on one of them: collectives must not end the others after torch's 10 minutes."""
    given = []

    @contextmanager
    def joined(world, device, timeout=None, patience=None):
        given.append((timeout, patience))
        yield

    monkeypatch.setattr("jepa_kit.distributed.collectives.process_group", joined)
    assert tool.main(["--checkpoint", str(run), "--protocol", "knn", "--label", "count", "--baselines", "none"]) == 0
    ((joining, waiting),) = given
    assert joining is None
    assert waiting >= timedelta(days=1)


def test_processes_that_cannot_join(tool, run, monkeypatch, capsys):
    def apart(*arguments, **options):
        raise StartError("rank 1 of 2 could not join the others")

    monkeypatch.setattr("jepa_kit.distributed.collectives.process_group", apart)
    assert tool.main(["--checkpoint", str(run), "--protocol", "knn"]) == 1
    assert capsys.readouterr().err == "eval_net.py: rank 1 of 2 could not join the others\n"


@pytest.mark.slow
@pytest.mark.integration
def test_two_processes_give_the_table_of_one(run, tmp_path):
    """Each extracts half of the images and asks half of the questions; one of them prints and writes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(TOOL), "--checkpoint", str(run), "--protocol", "knn", "train.device=cpu"]
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    outputs = []
    for name, start in (("one", [sys.executable, *command]), ("two", [*several, "--features", str(tmp_path / "f")])):
        start = [*start, "--output", str(tmp_path / f"{name}.json")]
        done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        outputs.append((done.stdout, json.loads((tmp_path / f"{name}.json").read_text())["rows"]))
    assert len(outputs[0][1]) == len(outputs[1][1]) == 12
    assert outputs[0][0].count("\n") == outputs[1][0].count("\n")
    for first, second in zip(outputs[0][1], outputs[1][1], strict=True):
        assert (first["network"], first["label"]) == (second["network"], second["label"])
        assert first["accuracy"] == pytest.approx(second["accuracy"], abs=0.1)


@pytest.mark.slow
@pytest.mark.integration
def test_an_error_of_one_process_ends_all(run, tmp_path):
    """The last image is in the second one's half: the first must not wait for it for days."""
    shards = tmp_path / "train"
    shutil.copytree(run.parent / "scenes" / "train", shards)
    dataset = ShardDataset(shards)
    file = shards / "shard-000000.tar"
    data = bytearray(file.read_bytes())
    offset, size = dataset._offsets[95, :2]
    data[offset : offset + size] = bytes(int(size))
    file.write_bytes(data)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(TOOL)]
    command += ["--checkpoint", str(run), "--protocol", "knn", "train.device=cpu", "--features", str(tmp_path / "f")]
    command += ["--train-shards", str(shards), "--test-shards", str(run.parent / "scenes" / "val")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert f"eval_net.py (rank 0): sample 95 ({dataset.key(95)!r}) of {shards} cannot be used: " in done.stderr
