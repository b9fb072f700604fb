"""What a report says of runs, and what it refuses to say; the page in a browser is in test_explorer.py."""

import base64
import io
import json
import pickle
import re
import shutil
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import Malicious, call_script, load_script, make_vae
from matplotlib.image import imsave
from test_scripts import FIGURES
from torch import nn

import pyro_vae.report.page
from pyro_vae import (
    VAE,
    LearnedNormalLikelihood,
    MLPDecoder,
    MLPEncoder,
    TrainingRecord,
    evaluate,
    load_preset,
    load_run,
)
from pyro_vae.report import texts as report_texts
from pyro_vae.report.cautions import cautions_of
from pyro_vae.report.comparison import Metric, compare, conditions
from pyro_vae.report.explorer import NoExplorerError, decoder_record
from pyro_vae.report.page import read_run, render, write_report
from pyro_vae.report.svg import panels
from pyro_vae.runs.folder import new_run, read_records, save_weights, write_config, write_json, write_jsonl

ALERT = "<script>alert(1)</script>"


@pytest.fixture
def run(tmp_path):
    """A run folder as svi_mnist.py leaves it, of a model that was not trained."""
    folder = small_run(tmp_path / "run", load_preset("bernoulli-z20", epochs=2), event_shape=(1, 8, 8), seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of importance weights, which the report tells
        figures = evaluate(load_run(folder), torch.rand(30, 1, 8, 8), importance_samples=30)
    test = {name: asdict(figure) for name, figure in figures.items()}
    write_json(folder / "metrics.json", {"seconds": 1.5, "train": {"neg_elbo": 45.0}, "test": test})
    parts = {"neg_elbo": 45.0, "reconstruction": 44.0, "kl": 1.0}
    records = [TrainingRecord(n, 5 * n, {"loss": 45.0, **parts}, parts) for n in (1, 2)]
    write_jsonl(folder / "metrics.jsonl", [record.to_json() for record in records])
    add_pictures(folder)
    return folder


@pytest.fixture
def report(capsys):
    return lambda *arguments: (call_script("report", *arguments), *capsys.readouterr())


def small_run(folder, settings=None, *, event_shape=(1, 4, 4), model=None, **provenance):
    """A run folder without a training: config and random weights."""
    settings = settings or load_preset("bernoulli-z10", hidden=(6,), latent_dim=2)
    path = new_run(folder, name="small")
    write_config(path, settings, event_shape=event_shape, **{"dataset": "digits", **provenance})
    save_weights(path, model or settings.build_model(event_shape))
    return path


def add_pictures(run):
    """Small ones, under the names of those that svi_mnist.py makes."""
    for name in FIGURES:
        imsave(run / "figures" / f"{name}.png", np.random.default_rng(len(name)).random((50, 60, 3)))


def latents(run, **changes):
    dimensions = json.loads((run / "config.json").read_text())["latent_dim"]
    content = {
        "means": torch.randn(7, dimensions).tolist(),
        "labels": [3, 8, 3, 3, 8, 8, 3],
        "classes": None,
        "kl_per_dimension": [0.5] * dimensions,
    }
    write_json(run / "latents.json", content | changes)
    return run


# --- one run ---


def test_a_run_of_svi_mnist(tmp_path, report):
    run = tmp_path / "run"
    arguments = ["--dataset", "digits", "--epochs", "2", "--no-figures", "--out", str(run)]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        assert load_script("svi_mnist").main(arguments) == 0
    add_pictures(run)
    code, out, err = report(run)
    assert (code, err) == (0, "")
    path = run / "report.html"
    assert out.startswith(f"{path}: ")
    page = path.read_text()
    assert len(page) < 8e6
    metrics = json.loads((run / "metrics.json").read_text())
    for name in ("neg_elbo", "log_marginal"):
        assert f"{metrics['test'][name]['value']:.2f}"[:-1] in page
    for text in ("bernoulli-z20", "digits, 1 x 8 x 8", "relaxed score", "2 epochs", "torch 2"):
        assert text in page
    pictures = sorted(p.stem for p in (run / "figures").iterdir() if p.stem != "training_curves")
    embedded = re.findall(r'<img src="data:image/png;base64,([^"]+)" width="(\d+)" height="(\d+)" alt="([^"]+)"', page)
    assert len(embedded) == len(pictures) == 8
    content = {base64.b64decode(image) for image, *_ in embedded}
    assert content == {(run / "figures" / f"{name}.png").read_bytes() for name in pictures}
    assert page.count("<polyline") == 6  # -ELBO, reconstruction and KL, training and test
    assert page.count("data-part=") >= 5  # the explorer is there
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # nothing from anywhere else
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")  # the name of a namespace, which nobody fetches


def test_an_earlier_report_is_replaced_and_the_title_shown(run, tmp_path, report):
    out = tmp_path / "page.html"
    out.write_text("earlier")
    assert report(run, "--out", out, "--title", "My <title>")[0] == 0
    assert "<h1>My &lt;title&gt;</h1>" in out.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]


def test_a_new_run_in_the_folder_removes_the_report_of_the_earlier_one(tmp_path):
    path = write_report([small_run(tmp_path / "run")])
    assert path == tmp_path / "run" / "report.html"
    new_run(tmp_path / "run", name="next", overwrite=True)
    assert not path.exists()


def test_a_run_that_was_stopped(run, report):
    (run / "metrics.json").unlink()
    shutil.rmtree(run / "figures")
    assert report(run)[0] == 0
    page = (run / "report.html").read_text()
    assert "This run is not finished" in page
    assert "the run was not evaluated" in page
    assert "--no-figures" in page
    assert "<polyline" in page
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").write_text("")
    assert report(run)[0] == 0
    page = (run / "report.html").read_text()
    assert "stopped before the end of its first epoch" in page
    assert "Training curves" not in page


def test_every_picture_of_svi_mnist_is_explained():
    assert set(report_texts.FIGURES) == set(FIGURES)


def test_settings_that_differ_from_the_preset(run):
    shown = {name: (value, of_preset) for name, value, of_preset in read_run(run).settings}
    assert shown["epochs"] == ("2", "40")
    assert shown["hidden"] == ("400", "")
    assert shown["seed"] == ("0", "")


def test_pictures_beyond_the_limit_are_left_out_by_name(run):
    record = read_run(run, limit=30_000)
    assert record.explorer is None
    assert "has room for" in record.no_explorer
    assert record.left_out
    assert sum(len(picture.base64) for picture in record.figures) <= 30_000
    page = render([record])
    assert "Omitted to limit the size of this page" in page
    assert all(name in page for name in record.left_out)


def test_several_runs_share_the_room_only_where_it_is_short(run, tmp_path, monkeypatch):
    twin = shutil.copytree(run, tmp_path / "twin")
    both = [read_run(folder).size for folder in (run, twin)]
    for limit, whole in ((sum(both), True), (sum(both) - 1, False)):
        monkeypatch.setattr(pyro_vae.report.page, "_LIMIT", limit)
        page = write_report([run, twin], tmp_path / "page.html").read_text()
        assert ("Omitted to limit" not in page) == whole
        assert len(page) < limit + 60_000


def test_panels():
    history = [TrainingRecord(n, 5 * n, {"loss": 1.0, "neg_elbo": 100.0 / n}, {"neg_elbo": 110.0 / n}) for n in (1, 2, 4)]
    panel, loss = panels(history)
    assert loss.name == "loss"  # which is another figure
    assert (panel.name, panel.unit) == ("neg_elbo", "epoch")
    assert panel.summary == "training from 100.00 to 25.00; test from 110.00 to 27.50"
    xs, ys = zip(*(map(float, pair.split(",")) for pair in panel.train.split()), strict=True)
    assert xs[1] - xs[0] == pytest.approx((xs[2] - xs[0]) / 3, abs=0.1)  # epoch 2 of 1 to 4
    assert ys[0] < ys[1] < ys[2] == 140  # downwards; the lowest value at the bottom
    assert panels([]) == panels([TrainingRecord(1, 5, {"loss": float("nan")})]) == []
    (one,) = panels([TrainingRecord(1, 3, {"loss": 2.0}), TrainingRecord(1, 5, {"loss": 2.0})])
    assert (one.unit, one.test) == ("step", "")


def test_the_loss_and_the_terms_of_an_objective_of_ones_own_have_panels():
    terms = {"loss": 7.0, "reconstruction": 5.0, "mmd": 0.2, "squared_error": 9.0}
    assert [panel.name for panel in panels([TrainingRecord(1, 5, terms, terms)])] == ["reconstruction", "loss", "mmd"]
    same = {"loss": 100.00000001, "neg_elbo": 100.0}  # compiled, a rounding apart
    assert [panel.name for panel in panels([TrainingRecord(1, 5, same)])] == ["neg_elbo"]


def test_pictures_are_read_as_the_model_is():
    standard = {"model": "VAE", "parts": {"module.prior": "StandardNormal"}, "batch": {"x": []}}
    own, conditional = standard | {"parts": {"module.prior": "NormalMixture"}}, standard | {"batch": {"x": [], "y": []}}

    def reading(name, config):
        return report_texts.title_and_reading(name, config)[1]

    for config in ({}, standard):  # {}: of an earlier version, described by settings
        assert "standard deviation 1" in reading("latent_pairs", config)
        assert "Training does not use the labels" in reading("tsne", config)
    assert "standard deviation 1" not in reading("latent_pairs", own)
    assert "Training does not use the labels" not in reading("tsne", conditional)
    assert "standard deviation 1" in reading("latent_pairs", conditional)


def test_cautions_of_a_run_from_python_name_what_works_there():
    weights = [Metric("log_marginal", -97.0, 0.01, 100, median_ess=1.5, unreliable=12)]
    for config, more in (
        ({"compile": "auto", "parts": {}}, "(--importance-samples)"),
        ({"model": "VAE"}, "(train_run(..., resume=True, importance_samples=...))"),
        ({"preset": "mine", "parts": {}}, "(train_run(..., resume=True, importance_samples=...))"),
    ):
        assert more in told(config, weights)["Importance weights are unreliable"]
    assert "with resume=True" in told({"model": "VAE"}, finished=False)["This run is not finished"]


def test_a_run_of_an_earlier_version(run):
    """Its metrics.jsonl had all numbers side by side, and no steps where training went by epochs."""
    parts = {"neg_elbo": 45.0, "reconstruction": 44.0, "kl": 1.0}
    times = {"seconds": 0.5, "images_per_second": 100.0}
    lines = [{"epoch": n, "loss": 45.0, **parts, **times, "test": {"loss": 45.0, **parts}} for n in (1, 2)]
    now, earlier = read_run(run).curves, run / "metrics.jsonl"
    write_jsonl(earlier, lines)
    assert read_run(run).curves == now
    assert [panel.unit for panel in now] == ["epoch"] * 3
    record = read_records(earlier)[1]
    assert record == TrainingRecord(
        2, 0, {"loss": 45.0, **parts}, {"loss": 45.0, **parts}, {"seconds": 0.5, "observations_per_second": 100.0}
    )
    by_steps = [{"epoch": 1, "step": step, "loss": 45.0, **parts, **times} for step in (10, 20)]
    write_jsonl(earlier, by_steps)
    assert [panel.unit for panel in read_run(run).curves] == ["step"] * 3
    write_report([run])


# --- what to beware of ---


def told(config=None, figures=(), *, finished=True, train=None, kl=None):
    named = {figure.name: figure for figure in figures}
    return dict(cautions_of(config or {}, named, finished=finished, train=train or {}, kl=kl))


def test_nothing_to_beware_of():
    figures = [
        Metric("neg_elbo", 102.4, 0.01, 10),
        Metric("log_marginal", -97.0, 0.01, 100, median_ess=90.0, unreliable=0),
    ]
    assert (
        told({"dataset": "digits", "requested_dataset": "digits"}, figures, train={"neg_elbo": 102.2}, kl=[1.0, 0.02]) == {}
    )


def test_warnings():
    assert "requested: auto" in told({"dataset": "digits", "requested_dataset": "auto"})["Digits instead of MNIST"]
    assert "--resume" in told(finished=False)["This run is not finished"]
    collapsed = told(kl=[1.0, 0.009, 2.0, 0.0])["Collapsed latents"]
    assert collapsed.startswith("z2, z4: ")
    assert "2 of 4 dimensions are active" in collapsed
    weights = Metric("log_marginal", -97.0, 0.01, 100, median_ess=4.6, unreliable=9306)
    text = told(figures=[weights])["Importance weights are unreliable"]
    assert "For 9,306 test observations" in text
    assert "100 draws" in text
    assert "4.6" in text
    assert "Importance weights were not checked" in told(figures=[Metric("log_marginal", -97.0, 0.01, 10, 9.0)])
    assert "neg_elbo: " in told(figures=[Metric("neg_elbo", 1.0)])["Error bars are missing"]
    nan = told(figures=[Metric("neg_elbo", float("nan"), 0.1)], train={"kl": float("inf")})
    assert nan["Metrics that are not finite"].startswith("neg_elbo, training kl: ")


@pytest.mark.parametrize(
    ("train", "test", "says"),
    [
        ({"neg_elbo": 80.0}, 100.0, "Train less"),
        ({"neg_elbo": 100.0}, 80.0, "train longer"),
        ({"neg_elbo": 481.0, "squared_error": 25.0, "kl": 7.0}, 490.0, "new data"),  # the constant is no part of the scale
    ],
)
def test_training_and_test_differ(train, test, says):
    assert says in told(figures=[Metric("neg_elbo", test, 0.01)], train=train)["Training and test differ"]


def test_a_test_curve_that_still_falls_asks_for_more(run):
    for figures, says in (((9.0, 8.0), "train longer"), ((8.0, 9.0), "Train less")):
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["train"]["neg_elbo"] = metrics["test"]["neg_elbo"]["value"] / 2
        write_json(run / "metrics.json", metrics)
        write_jsonl(run / "metrics.jsonl", [{"epoch": i, "test": {"neg_elbo": figure}} for i, figure in enumerate(figures)])
        assert says in dict(read_run(run).warnings)["Training and test differ"]


def test_a_nan_in_metrics_is_told(run):
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["test"]["neg_elbo"] |= {"value": float("nan"), "standard_error": float("nan")}
    write_json(run / "metrics.json", metrics)
    headlines = [headline for headline, _ in read_run(run).warnings]
    assert {"Metrics that are not finite", "Error bars are missing"} <= set(headlines)


def test_latents_name_collapsed_dimensions_and_choose_the_axes(run):
    kl = [0.5] * 20
    kl[4], kl[11], kl[2] = 2.0, 3.0, 0.001
    record = read_run(latents(run, kl_per_dimension=kl, classes=[f"digit {n}" for n in range(10)]))
    assert record.explorer["axes"] == [4, 11]
    assert record.explorer["classes"] == ["digit 3", "digit 8"]
    assert record.explorer["labels"] == [0, 1, 0, 0, 1, 1, 0]
    assert dict(record.warnings)["Collapsed latents"].startswith("z3: ")


# --- several runs ---

GREY = {"dataset": "mnist", "binarization": "none", "likelihood": "bernoulli"}


def group(config=None, shape=(1, 28, 28), **changes):
    return conditions(GREY | (config or {}), shape, **changes)


@pytest.mark.parametrize(
    ("other", "apart"),
    [
        (group({"dataset": "kmnist"}), {"data set"}),
        (group({"binarization": "dynamic"}), {"binarisation", "likelihood"}),  # a probability, no longer a relaxed score
        (group({"likelihood": "normal"}), {"likelihood"}),
        (group({"likelihood": "another"}), {"likelihood"}),
        (group(shape=(1, 32, 32)), {"size"}),
        (group(images=500), {"data set"}),
    ],
)
def test_what_is_not_comparable_is_not_ranked(other, apart):
    figures = {"neg_elbo": Metric("neg_elbo", 100.0, 0.1)}
    better = {"neg_elbo": Metric("neg_elbo", 90.0, 0.1)}
    groups = compare([("a", group(), figures), ("b", other, better)])
    assert len(groups) == 2
    for one in groups:
        assert {reason.split(":")[0] for reason in one.apart} == apart
        assert [verdict for _, row in one.rows for _, verdict in row.values()] == [""]


def verdicts(*figures, note=""):
    (only,) = compare([(f"run {i}", group(), {figure.name: figure}) for i, figure in enumerate(figures)])
    assert only.apart == ()
    assert note in " ".join(only.notes)
    assert bool(note) == bool(only.notes)
    return [verdict for _, row in only.rows for _, verdict in row.values()]


def test_ranks_within_the_errors():
    tied = "not distinguishable from the best"
    elbo = [Metric("neg_elbo", value, error, 10) for value, error in ((100.0, 0.3), (100.9, 0.4), (101.1, 0.4))]
    assert verdicts(*elbo) == ["best", tied, ""]  # 2 sqrt(0.3^2 + 0.4^2) = 1
    marginal = [Metric("log_marginal", value, 0.1, 100, 90.0, 0) for value in (-98.0, -97.0)]
    assert verdicts(*marginal) == ["", "best"]  # higher is better
    assert verdicts(*[Metric("kl", value, 0.0) for value in (1.0, 2.0)]) == ["", ""]  # neither way is better


def test_what_cannot_be_ranked_says_why():
    few, many = (Metric("log_marginal", -98.0, 0.1, draws, 90.0, 0) for draws in (100, 5000))
    assert verdicts(few, many, note="the runs made 100 and 5,000 draws") == ["", ""]
    bare = Metric("neg_elbo", 99.0)
    assert verdicts(Metric("neg_elbo", 100.0, 0.1), bare, note="no finite value with a standard error for run 1") == [
        "",
        "",
    ]
    bad = Metric("log_marginal", -98.0, 0.1, 100, 4.0, 12)
    assert verdicts(few, bad, note="The order by log p(x) is uncertain")[0] == "best"


def test_a_page_of_several_runs(run, tmp_path, report, monkeypatch):
    monkeypatch.chdir(tmp_path)
    twin = shutil.copytree(run, tmp_path / "twin")
    small_run(tmp_path / "other", load_preset("gaussian-z4", hidden=(6, 5)))
    code, out, _ = report(run, twin, "other")
    assert code == 0
    assert out.startswith("report.html: ")
    page = (tmp_path / "report.html").read_text()
    assert "form 2 groups" in page
    assert "must not be compared" in page
    assert "likelihood: normal with variance 1/2: a density" in page
    assert page.count("not distinguishable from the best") == 2  # the twin's -ELBO and log p(x)
    assert page.count('<div class="explorer"') == 3
    code, _, err = report(run, tmp_path / "run")
    assert code == 2
    assert "Pass each once" in err


def test_runs_of_one_name_are_shown_by_their_paths(tmp_path):
    folders = [small_run(tmp_path / part / "run") for part in "ab"]
    page = write_report(folders, tmp_path / "page.html").read_text()
    assert all(str(folder) in page for folder in folders)


def test_data_of_ones_own_are_not_taken_for_the_same(tmp_path):
    runs = [read_run(small_run(tmp_path / name, dataset="array")) for name in "ab"]
    assert len(compare([(run.name, run.conditions, run.metrics) for run in runs])) == 2


# --- nothing in a run becomes HTML, or runs ---


def test_data_of_ones_own_are_the_same_where_their_test_images_are(tmp_path):
    runs = [
        small_run(
            tmp_path / name, dataset="pictures", data="/some/pictures", test_identity=f"60 of shape (1, 4, 4), CRC-32 {crc}"
        )
        for name, crc in (("one", "0a"), ("two", "0a"), ("three", "0b"))
    ]
    one, two, three = (read_run(run).conditions for run in runs)
    assert one == two != three


def test_everything_is_escaped(tmp_path):
    folder = small_run(
        tmp_path / "<img src=x onerror=alert(1)>", dataset=ALERT, versions={ALERT: ALERT}, note=f"</td>{ALERT}\ud800"
    )
    write_json(folder / "metrics.json", {"test": {ALERT: {"value": 1.0, "standard_error": 0.1}}})
    write_jsonl(folder / "metrics.jsonl", [{"epoch": 1, "loss": 2.0}])
    latents(folder, classes=["</script><script>alert(2)</script>"] * 10)
    page = write_report([folder], title=f"</title>{ALERT}").read_text()
    assert page.count("<script") == page.count("</script>") == 2  # the explorer's data, and explorer.js
    for evil in ("<script>alert", "<img src=x", "</title><script"):
        assert evil not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 6
    assert r"\u003c/script\u003e\u003cscript\u003ealert(2)" in page


def test_code_in_weights_is_not_run(run, report, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (run / "checkpoints" / "weights.pt").write_bytes(pickle.dumps(Malicious()))
    code, _, err = report(run)
    assert code == 2
    assert err.startswith("error: ")
    assert not (tmp_path / "pwned").exists()
    torch.save(Malicious(), run / "checkpoints" / "weights.pt")
    assert report(run)[0] == 2
    assert not (tmp_path / "pwned").exists()


def test_numbers_out_of_range(run):
    metrics = {"test": {"neg_elbo": {"value": 10**400}, "kl": {"value": 1.0, "standard_error": -1.0, "num_samples": True}}}
    write_json(run / "metrics.json", metrics)
    write_jsonl(run / "metrics.jsonl", [{"epoch": n, "loss": loss} for n, loss in enumerate((1.0, 1e308, -1e308, 10**400))])
    record = read_run(run)
    assert list(record.metrics) == ["kl"]
    assert str(record.metrics["kl"]) == "1.00 (no error given)"
    assert len(record.curves) == 1
    render([record])


BAD_LATENTS = {
    "not an object": [],
    "missing entries": {"means": []},
    "another dimension": {"means": [[0.0] * 3], "labels": None, "kl_per_dimension": [0.0] * 3},
    "labels of another length": {"means": [[0.0] * 20], "labels": [1, 2], "kl_per_dimension": [0.0] * 20},
    "no finite numbers": {"means": [[float("nan")] * 20], "labels": None, "kl_per_dimension": [0.0] * 20},
    "a class too few": {"means": [[0.0] * 20], "labels": [1], "classes": ["a"], "kl_per_dimension": [0.0] * 20},
}


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("config.json", "["),
        ("config.json", "{}"),
        ("metrics.json", '{"test": '),
        ("metrics.json", "[1]"),
        ("metrics.jsonl", "epoch 1"),
        ("metrics.jsonl", "1\n2\n"),
        ("metrics.jsonl", '{"loss": 1.0}'),
        ("metrics.jsonl", '{"epoch": 1, "train": {"loss": 1.0}, "step": "one"}'),
        ("metrics.jsonl", '{"epoch": 1, "loss": 1.0, "test": 3}'),
        ("checkpoints/weights.pt", "no weights"),
        ("figures/tsne.png", "no picture"),
        *(("latents.json", json.dumps(content)) for content in BAD_LATENTS.values()),
    ],
)
def test_a_damaged_run_is_one_line_and_exit_code_2(run, report, part, content):
    (run / part).write_text(content)
    code, out, err = report(run)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {run}")
    assert part.split("/")[-1] in err
    assert err.count("\n") == 1
    assert not (run / "report.html").exists()


def test_no_run_and_no_place_to_write(run, tmp_path, report):
    code, _, err = report(tmp_path / "nothing")
    assert code == 2
    assert re.fullmatch(r"error: .*nothing/config.json: missing. .*\n", err)
    code, _, err = report(run, "--out", tmp_path / "no" / "page.html")
    assert code == 2
    assert "page.html: cannot be written" in err
    assert report()[0] == 2


# --- which decoders a page can run ---


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (load_preset("conv-gaussian").build_model((1, 32, 32)), "convolutional"),
        (load_preset("autoencoder-z2", hidden=(4,)).build_model((1, 8, 8)), "no prior"),
        (make_vae(event_shape=(5,)), "no images"),
        (make_vae(event_shape=(2, 4, 4)), "no images of 1 or 3 channels"),
        (make_vae(event_shape=(1, 64, 64), hidden=(400,)), "6.6 MB"),
        (make_vae(likelihood=LearnedNormalLikelihood()), "LearnedNormalLikelihood"),
        (
            VAE(
                MLPEncoder((1, 4, 4), hidden=(4,), latent_dim=2),
                MLPDecoder((1, 4, 4), hidden=(4,), latent_dim=2, activation=nn.GELU),
                latent_dim=2,
                event_shape=(1, 4, 4),
            ),
            "GELU",
        ),
        (
            VAE(MLPEncoder((1, 4, 4), hidden=(4,), latent_dim=2), nn.Linear(2, 16), latent_dim=2, event_shape=(1, 4, 4)),
            "its decoder is a Linear",
        ),
    ],
)
def test_decoders_that_a_page_does_not_run(model, why):
    with pytest.raises(NoExplorerError, match=why):
        decoder_record(model)


def test_weights_that_are_no_numbers(vae):
    vae.decoder.output.bias.data[3] = torch.nan
    with pytest.raises(NoExplorerError, match="not all finite"):
        decoder_record(vae)


def test_the_reason_is_in_the_page(tmp_path):
    settings = load_preset("conv-gaussian")
    folder = small_run(tmp_path / "conv", settings, event_shape=(1, 32, 32))
    page = write_report([folder]).read_text()
    assert "Not for this run: its decoder is convolutional" in page
    assert '<div class="explorer"' not in page
