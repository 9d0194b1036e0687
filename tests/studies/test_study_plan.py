"""From the file of a study to its checked cells."""

import shutil

import pytest

from jepa_kit.errors import ConfigError
from jepa_kit.studies.plan import plan_study
from jepa_kit.studies.records import write_data
from jepa_kit.studies.spec import flatten, protocol_title, read_study


def problems_of(file, machine=()):
    with pytest.raises(ConfigError) as error:
        plan_study(file, machine)
    return list(error.value.problems)


def test_every_combination_is_an_arm_named_by_what_differs(write_study):
    plan = plan_study(write_study())
    assert [arm.name for arm in plan.arms] == [
        "masker.ratio=0.5, encoder.depth=2",
        "masker.ratio=0.5, deep",
        "masker.ratio=0.25, encoder.depth=2",
        "masker.ratio=0.25, deep",
    ]
    assert [(job.title, job.seed) for job in plan.jobs[3:8]] == [
        *((arm.name, 0) for arm in plan.arms),
        (plan.arms[0].name, 1),
    ]
    assert plan.arms[3].config.slots["encoder"].options["depth"] == 3
    assert plan.arms[3].config.slots["masker"].options["ratio"] == 0.25
    assert plan.arms[0].config.train.precision == "float32"


@pytest.mark.parametrize(
    ("title", "layers", "spec"),
    [
        ("logistic regression on the last four layers, all labels", "last4", {"name": "logistic", "subsets": ["all"]}),
        (
            "logistic regression on the last 12 layers, subsets 1% and all",
            "last12",
            {"name": "logistic", "subsets": ["1%", "all"]},
        ),
        ("nearest neighbours on the last layer, neighbours 5", "last", {"name": "knn", "neighbours": [5]}),
        ("linear probe on layers 1+2", "1+2", {"name": "linear"}),
        ("paper transfer, epochs 3", None, {"name": "paper_transfer", "epochs": 3}),
    ],
)
def test_a_protocol_is_named_in_words(title, layers, spec):
    assert protocol_title(spec, layers) == title


def test_two_arms_with_one_config_are_an_error(write_study):
    masker = {"name": "multiblock", "min_keep": 1}
    arms = [
        {"name": "one"},
        {"name": "two", "masker": masker | {"edges": "inclusive"}},
        {"name": "three", "masker": masker},
    ]
    assert problems_of(write_study({"masker": masker}, factors=None, arms=arms)) == [
        f"arm {name} has the same config as one: leave one (overrides of a part with the same name keep its other "
        "options)"
        for name in ("two", "three")
    ]


def test_each_baseline_is_there_once_for_each_network(write_study):
    plan = plan_study(write_study())
    assert [job.title for job in plan.baselines] == [
        "untrained",
        "untrained (masker.ratio=0.5, deep)",
        "pixels",
    ]
    assert [job.arms for job in plan.baselines] == [(0, 2), (1, 3), (0, 1, 2, 3)]
    assert len({job.id for job in plan.jobs}) == len(plan.jobs)
    only_networks = plan_study(write_study(protocols=[{"name": "finetune", "epochs": 1}], baselines=["pixels"]))
    assert only_networks.baselines == []


def test_arms_that_are_listed(write_study):
    arms = [{}, {"masker": {"name": "multiblock", "min_keep": 1}}, {"name": "own", "encoder.depth": 1}]
    plan = plan_study(write_study(factors=None, arms=arms, match="none", protocols=["knn"]))
    assert [arm.name for arm in plan.arms] == [
        "masker=random encoder.depth=2",
        "masker=multiblock masker.min_keep=1 encoder.depth=2",
        "own",
    ]


def test_arms_of_other_recipes(write_study):
    overrides = {"encoder.depth": 2, "data": {"image_size": 32}, "encoder.patch_size": 4, "optim.warmup_epochs": 0}
    overrides |= {"train": {"epochs": 1, "batch_size": 8}}
    arms = [{"base": "mae/quick"}, {"base": "quickstart", "name": "I-JEPA"}, {}]
    plan = plan_study(write_study(factors=None, arms=arms, overrides=overrides, protocols=["knn"], match="images"))
    assert [arm.name for arm in plan.arms] == ["mae/quick", "I-JEPA", "base"]
    assert [arm.config.slots["target"].name for arm in plan.arms] == ["pixel", "representation", "representation"]
    assert {arm.config.slots["encoder"].options["depth"] for arm in plan.arms} == {2}


@pytest.mark.parametrize(
    ("one", "other", "sets", "also_sets"),
    [
        (
            [{"masker": {"ratio": 0.5}}, {}],
            [{}, {"masker.ratio": 0.6}],
            "0] sets masker.ratio (=0.5)",
            "masker.ratio (=0.6)",
        ),
        (
            [{"masker.ratio": 0.6}, {"masker": {"name": "block"}}],
            [{"masker.ratio": 0.6}, {"masker": {"name": "random"}}],
            "1] sets masker.name (='block')",
            "masker.name (='random')",
        ),
        ([{}, {"head": None}], [{}, {"head.layers": 2}], "1] sets head (=None)", "head.layers (=2)"),
        (
            [{}, {"loss.weight": 2}],
            [{}, {"loss": [{"name": "l1"}]}],
            "1] sets loss.weight (=2)",
            "loss (=[{'name': 'l1'}])",
        ),
        ([{"base": "base.yaml"}], [{}, {"base": "quickstart"}], "0] sets base (='base.yaml')", "base (='quickstart')"),
    ],
)
def test_two_factors_that_set_one_key_are_an_error(write_study, one, other, sets, also_sets):
    factors = {"one": one, "depth": [{}, {"encoder.depth": 3}], "other": other}
    assert problems_of(write_study(factors=factors)) == [
        f"factors.one[{sets} and factors.other[1] sets {also_sets}, but an arm can have only one of them: set it in "
        "one factor, or list the arms (arms) in place of factors"
    ]


def test_two_factors_may_set_one_key_to_the_same_value(write_study):
    more = [{"masker": {"name": "random"}}, {"masker": {"name": "random"}, "encoder.depth": 3, "loss": {}}]
    plan = plan_study(write_study(factors={"ratio": [{"masker": {"name": "random", "ratio": 0.3}}], "more": more}))
    assert [arm.config.slots["masker"].options["ratio"] for arm in plan.arms] == [0.3, 0.3]


@pytest.mark.parametrize("order", [("kind", "ratio"), ("ratio", "kind")])
def test_a_factor_that_replaces_a_part_keeps_what_another_sets_inside_it(write_study, order):
    factors = {"kind": [{}, {"masker": {"name": "blockwise"}}], "ratio": [{"masker.ratio": x} for x in (0.3, 0.4)]}
    masker = {"name": "random", "ratio": 0.6}
    plan = plan_study(write_study(overrides={"masker": masker}, factors={name: factors[name] for name in order}))
    parts = {(part.name, part.options["ratio"]) for part in (arm.config.slots["masker"] for arm in plan.arms)}
    assert parts == {("random", 0.3), ("random", 0.4), ("blockwise", 0.3), ("blockwise", 0.4)}


@pytest.mark.parametrize("match", ["steps", "images", "flops"])
def test_arms_cost_the_same(write_study, match):
    factors = {"batch": [{"train.batch_size": 8}, {"train.batch_size": 4}], "depth": [{}, {"encoder.depth": 4}]}
    base = {"train": {"batch_size": 8, "epochs": 1, "steps_per_epoch": 200}}
    plan = plan_study(write_study(base, factors=factors, match=match))
    costs = [length.cost(match) for length in plan.lengths]
    assert costs == pytest.approx([costs[0]] * 4, rel=0.01)
    assert [arm.config.train.steps_per_epoch for arm in plan.arms] == [length.steps for length in plan.lengths]
    if match == "flops":
        assert plan.lengths[2].steps > 1.5 * plan.lengths[0].steps
        assert plan.lengths[1].steps < plan.lengths[0].steps


def test_cells_are_the_same_after_a_change_that_does_not_concern_them(write_study):
    before = {job.id for job in plan_study(write_study()).jobs}
    more = plan_study(write_study(seeds=[1, 0, 2]))
    assert before < {job.id for job in more.jobs}
    named = [{"name": "half", "masker": {"ratio": 0.5}}, {"masker": {"ratio": 0.25, "name": "random"}}]
    renamed = plan_study(write_study(factors={"depth": [{}, {"encoder": {"depth": 3}}], "ratio": named}))
    assert {job.id for job in renamed.jobs} == before
    protocols = plan_study(write_study(protocols=["knn", {"name": "logistic", "layers": "last2"}]))
    assert {job.id for job in protocols.jobs} == before


def test_all_mistakes_of_all_arms_are_reported_at_once(write_study, labelled):
    factors = {"mask": [{"masker": {"ratio": 2.0}}, {"masker": {"rato": 0.5}}], "depth": [{}, {"encoder.depht": 1}]}
    found = problems_of(
        write_study(
            factors=factors,
            overrides={"optim.lrr": 1},
            labels=["shap"],
            protocols=[{"name": "knn", "layers": "last9"}, "logistc", {"name": "linear", "epochs": "x"}],
        )
    )
    text = "\n".join(found)
    assert found.count(next(line for line in found if "optim.lrr" in line)) == 1
    for part in (
        "optim.lrr is not an option; did you mean 'lr'?",
        "arms masker={rato: 0.5}, base; masker={rato: 0.5}, encoder.depht=1: masker.rato is not an option of",
        "masker.rato is not an option of 'random'; did you mean 'ratio'?",
        "encoder.depht is not an option of 'vit'; did you mean 'depth'?",
        "'logistc' is not a registered protocol; did you mean 'logistic'?",
        "protocols[2].epochs (='x') must be an int",
    ):
        assert part in text, part


def test_what_parts_refuse_is_reported_with_their_arm(write_study):
    factors = {"mask": [{"masker": {"ratio": 0.5}}, {"masker": {"ratio": 2.0}}]}
    found = problems_of(write_study(factors=factors, labels=["shap"], protocols=[{"name": "knn", "layers": "last9"}]))
    asked = (
        "arm masker.ratio=0.5: protocol nearest neighbours on the last nine layers: layers (='last9') needs 9 layers"
    )
    assert any(line.startswith(asked) for line in found)
    assert any(line.startswith("arm masker.ratio=2.0: masker: ratio (=2.0)") for line in found)
    assert "labels (='shap') must be of the shards': count, distance, shape" in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "seeds (=()) must be at least one, different and not negative"),
        ({"seeds": [1, 1]}, "seeds (=(1, 1)) must be at least one, different and not negative"),
        ({"seeds": None}, "seeds is missing"),
        ({"factors": None}, "factors or arms must be given, and not both"),
        ({"arms": [{}]}, "factors or arms must be given, and not both"),
        ({"factors": {"a": []}}, "factors.a (=[]) must be a list of levels, at least one, each a mapping of overrides"),
        ({"factors": {"a": {"encoder.depth": 3}}}, "factors.a (={'encoder.depth': 3}) must be a list of levels"),
        ({"factors": {"encoder.depth": 3}}, "at least one, each a mapping of overrides, such as {encoder.depth: 3}"),
        ({"factors": ["a"]}, "factors (=['a']) must be a mapping"),
        ({"factors": {"a": [{"train.seed": 1}]}}, "factors.a[0]: train.seed must be left out"),
        ({"overrides": {"train.output_dir": "runs"}}, "overrides: train.output_dir must be left out"),
        (
            {"factors": {"a": [{"train": {"epochs": 2}}]}},
            "factors.a[0]: train.epochs must be left out, as match (=steps)",
        ),
        ({"factors": {"a": [{"name": 3}]}}, "factors.a[0].name (=3) must be text"),
        ({"overrides": {"base": "x"}}, "overrides.base (='x') must be text"),
        ({"precision": "auto"}, "precision (='auto') must be one of 'float32', 'tf32', 'bf16'"),
        ({"match": "time"}, "match (='time') must be one of"),
        ({"baselines": ["pixel"]}, "baselines (='pixel') must be of untrained, pixels"),
        ({"sedes": [1]}, "sedes is not an option; did you mean 'seeds'?"),
    ],
)
def test_mistakes_of_the_file(write_study, changes, message):
    assert any(message in line for line in problems_of(write_study(**changes)))


@pytest.mark.parametrize(
    ("factor", "level", "meant"),
    [
        ("depth", 3, "masker.ratio: 0.6"),
        ("depth", None, "masker.ratio: 0.6"),
        ("depth", "encoder.depth=3", "encoder.depth: 3"),
        ("encoder.depth", 3, "encoder.depth: 3"),
        ("encoder.positions", "rotary", 'encoder.positions: "rotary"'),
        ("encoder.depth", "encoder.depth=3", "encoder.depth: 3"),
        ("encoder.depth", ["encoder.depth=3"], "masker.ratio: 0.6"),
    ],
)
def test_a_level_that_is_no_mapping_is_named_alone(write_study, factor, level, meant):
    right = f"must be a mapping of overrides, such as {{{meant}}}, or {{}} for the base as it is"
    factors = {"mask": [{"masker": {"ratio": 0.5}}], factor: [{}, level]}
    found = problems_of(write_study(factors=factors, sedes=[1]))
    assert found[1:] == [f"factors.{factor}[1] (={level!r}) {right}"]
    assert found[0].startswith("sedes is not an option")


def test_an_arm_that_is_no_mapping_is_named_alone(write_study):
    assert problems_of(write_study(factors=None, arms=[{}, "masker.ratio=0.3"])) == [
        "arms[1] (='masker.ratio=0.3') must be a mapping of overrides, such as {masker.ratio: 0.3}, or {} for the base "
        "as it is"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_shards": "/nowhere"}, "/nowhere"),
        ({"train_shards": None}, "train_shards must name a folder of shards, as the base config has none"),
        ({"factors": {"a": [{}, {}]}}, "2 arms have the name base: leave one out if they are the same, else name"),
        ({"base": "nothing"}, "nothing"),
        ({"protocols": ["knn", "knn"]}, "protocols[1] (=nearest neighbours on the last layer) is in the list already"),
        ({"protocols": [{"name": "knn", "neighbours": []}]}, "protocols[0]: "),
        ({"factors": {"a": [{"train.precision": "auto"}]}}, "train.precision (='auto') must be another"),
        (
            {"factors": {"b": [{}, {"train.batch_size": 500}]}},
            "arm train.batch_size=500: train.batch_size (=500) must be at",
        ),
        (
            {"factors": {"b": [{}, {"train.batch_size": 64}]}},
            "arm train.batch_size=64: train.epochs (=1) of 2 steps cost 33.3 % more images",
        ),
        (
            {"protocols": [{"name": "knn", "pooling": "class"}]},
            "pooling (='class') needs an encoder with a class token",
        ),
    ],
)
def test_mistakes_of_what_it_names(write_study, changes, message):
    found = problems_of(write_study(**{"match": "images", **changes}))
    assert any(message in line for line in found), found


def test_probes_are_not_tested_on_what_they_learn_from(write_study, labelled, tmp_path):
    copy = shutil.copytree(labelled / "train", tmp_path / "copy")
    for test in (labelled / "train", copy):
        found = problems_of(write_study(test_shards=str(test)))
        assert found == [f"test_shards (={test}) must be others than the training shards, {labelled / 'train'}"]


def test_a_protocol_of_masks_needs_shards_with_masks(write_study, shards):
    found = problems_of(write_study(labels=None, protocols=["dense"], test_shards=str(shards)))
    assert "protocol dense needs shards with masks, and test_shards have none" in found


def test_no_such_study(tmp_path):
    with pytest.raises(FileNotFoundError, match="a study is a YAML file"):
        read_study(tmp_path / "none.yaml")


def test_shards_that_are_elsewhere_are_known_by_their_record(write_study, tmp_path):
    here = plan_study(write_study())
    elsewhere = {f"/elsewhere/{place.rsplit('/', 1)[1]}": identity for place, identity in here.data.items()}
    write_data(tmp_path / "results", elsewhere)
    file = write_study(train_shards="/elsewhere/train", test_shards="/elsewhere/test")
    there = plan_study(file, results=tmp_path / "results")
    assert [job.id for job in there.jobs] == [job.id for job in here.jobs]
    assert [list(job.evaluations) for job in there.jobs] == [list(job.evaluations) for job in here.jobs]


def test_dotted_and_nested_keys_are_the_same():
    assert flatten({"train": {"epochs": 1, "seed": 2}, "optim.lr": 1, "loss": {}}) == {
        "train.epochs": 1,
        "train.seed": 2,
        "optim.lr": 1,
        "loss": {},
    }
