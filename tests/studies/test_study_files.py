"""The studies that ship: each is checked with stand-ins for its data, and none trains."""

import re
from pathlib import Path

import pytest

from jepa_kit.studies.arms import combine, load_arms
from jepa_kit.studies.plan import plan_study
from jepa_kit.studies.records import write_data
from jepa_kit.studies.spec import read_study, study_protocols

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("projects/*/studies/*.yaml"))


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request, monkeypatch):
    """The file of a study; paths start at the repository's root, where its command runs."""
    monkeypatch.chdir(ROOT)
    return request.param


def test_arms_are_named_and_their_configs_are_valid(file):
    study, problems = read_study(file), []
    arms = load_arms(study, file.parent, (), problems)
    protocols = study_protocols(study, problems)
    assert problems == []
    assert protocols
    assert len({arm.name for arm in arms}) == len(combine(study)) > 1
    assert all("=" not in arm.name for arm in arms), "names for readers, not overrides"


def test_the_card_says_what_a_reader_needs(file):
    text = file.read_text()
    card = dict(re.findall(r"^# (data|command|cost|result|not shown) +(\S.*)$", text, re.MULTILINE))
    assert card.keys() >= {"data", "command", "cost", "result"}
    assert card["command"] == f"python tools/ablate.py {file.relative_to(ROOT)}"
    assert "ot shown" in text
    report = file.with_suffix("") / "report.md"
    assert report.exists() != card["result"].startswith("not run yet")


def test_the_page_lists_every_study(file):
    assert file.stem in (ROOT / "docs" / "studies.md").read_text()


@pytest.mark.slow
def test_every_cell_is_valid(file, tmp_path):
    study = read_study(file)
    arms = load_arms(study, file.parent, (), [])
    places = {study.train_shards: 8064, study.test_shards: 1920} | {
        arm.config.data.shards: 1_281_167 if "imagenet" in arm.config.data.shards else 8064 for arm in arms
    }
    shards = {"labels": ["class"], "masks": False}
    write_data(tmp_path, {place: {"samples": count, "digest": place, **shards} for place, count in places.items()})
    plan = plan_study(file, results=tmp_path)
    cells = [job.id for job in plan.jobs if job.kind == "cell"]
    assert len(set(cells)) == len(cells) == len(arms) * len(study.seeds)
