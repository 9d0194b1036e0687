from dataclasses import fields

from PIL import Image

from jepa_kit.engine.logging import curves
from jepa_kit.engine.logging.curves import plot_curves
from jepa_kit.engine.logging.telemetry import Journal
from jepa_kit.evaluation.health.measure import Health
from jepa_kit.evaluation.online import PANELS, PROBES


def line(step, **more):
    return {
        "step": step,
        "epoch": 0,
        "samples": 8 * (step + 1),
        "loss": 0.5,
        "loss/l2": 0.2,
        "loss/l1": 0.3,
        "lr": 1e-3 * step,
        "weight_decay": 0.04,
        "momentum": 0.996,
        "grad_norm": 1.5,
        "images_per_second": 16.0,
        "mfu": 0.25,
        "data_wait": 0.25,
        "peak_memory_gib": 2.0,
        "data/skipped": 0.0,
        **more,
    }


def draw(folder, lines):
    with Journal(folder, first_step=0, steps=9, bar=False) as journal:
        for each in lines:
            journal.write(each)
    path = plot_curves(folder, PANELS)
    assert path == folder / "curves.png"
    with Image.open(path) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
        return picture.size


def test_nothing_to_draw(tmp_path):
    assert plot_curves(tmp_path) is None


def test_a_row_for_each_four_values(tmp_path):
    """1200 pixels wide; 340 high for the loss and 190 for each row of four."""
    size = draw(tmp_path, [line(step) for step in range(3)])
    assert size == (1200, 340 + 2 * 190)


def test_what_hooks_gave_has_panels_of_its_own(tmp_path):
    """Below: 30 for a title, and 220 for each row of four."""
    values = {f"online/{name}": 0.5 for name in "abcde"}
    size = draw(tmp_path, [line(0), line(1, **values), line(2)])
    assert size == (1200, 340 + 2 * 190 + 30 + 2 * 220)


def test_figures_of_one_unit_share_a_panel(tmp_path, monkeypatch):
    drawn = []
    plain = curves._draw

    def draw_panel(axes, records, panel, last, **options):
        plain(axes, records, panel, last, **options)
        texts = [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []
        drawn.append((axes.get_title(), len(axes.lines), texts, [t.get_text() for t in axes.get_yticklabels()]))

    monkeypatch.setattr(curves, "_draw", draw_panel)
    values = {"eval/knn": 0.5, "eval/verdict": 1.0, "eval/rankme": 5.0, "eval/lidar": 4.0, "eval/cosine": 0.1}
    draw(tmp_path, [line(0), line(1, **values, **{"other/value": 1.0}), line(2)])
    titles = [title for title, *_ in drawn]
    assert titles[:3] + titles[8:] == [
        "loss",
        "learning rate",
        "weight decay",
        "peak memory, GiB",
        "accuracy of the probe, %",
        "verdict",
        "ranks, in directions",
        "cosine of features",
        "other/value",
    ]
    lines = {title: rest for title, *rest in drawn}
    assert lines["accuracy of the probe, %"][:2] == [1, ["knn"]]
    assert lines["ranks, in directions"][:2] == [2, ["rankme", "lidar"]]
    assert lines["cosine of features"][:2] == [1, []]
    assert lines["verdict"][2][:3] == ["healthy", "not\nlearned", "dimensional\ncollapse"]


def test_every_figure_of_an_evaluation_has_its_panel():
    figures = {f.name for f in fields(Health) if "float" in str(f.type)} - {"features"}
    figures |= {"relative_to_mean", "relative_to_position", "cross_sample_gap", "verdict", "seconds", *PROBES}
    drawn = [key for panel in PANELS for key in panel.keys]
    assert sorted(drawn) == sorted(f"eval/{name}" for name in figures)


def test_lines_of_an_older_version_lack_values(tmp_path):
    old = {key: value for key, value in line(0).items() if key in ("step", "epoch", "samples", "loss", "lr")}
    left_out = {"step": 2, "epoch": 0, "samples": 24, "online/knn": 5.0}
    assert draw(tmp_path, [old | {"momentum": 1.0, "images_per_second": 1.0, "data_wait": 0.0}, line(1), left_out])
    assert plot_curves(tmp_path)


def test_a_picture_that_fails_is_a_warning(capsys):
    def fail():
        raise ValueError("no room")

    assert curves.drawn("curves.png", fail) is None
    assert capsys.readouterr().err == "warning: curves.png was not drawn: ValueError: no room\n"
    assert curves.drawn("curves.png", lambda: 3) == 3


def test_figures_of_a_recipe_have_panels_beside_the_schedules(tmp_path):
    """Eight panels are two rows of four; a ninth begins the third row."""
    assert draw(tmp_path, [line(0, **{"figures/kl": 0.5}), line(1)]) == (1200, 340 + 3 * 190)
