"""Jobs as W&B runs: what arrives at a server that speaks W&B's protocol, and in what state."""

import json
import socket
import subprocess
import sys

import pytest
import wandb_here
from browser import needs_chromium, opened
from omegaconf import OmegaConf
from short_runs import DRAWN, rows, summary, tiny

from ldt import experiment
from ldt.callbacks import wandb_logger
from ldt.callbacks.wandb_logger import WandbRun, rank_zero_only, run_id
from ldt.cli import repetition
from ldt.module import DetectorModule

METHODS = ("l1", "random")
ONLINE = ["logger=wandb", "logger.mode=online", "prune=oneshot", "trainer.log_every_n_steps=1"]
ABOUT = {"study": "compare", "name": "one", "project": "ldt"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    found, process = wandb_here.start(folder)
    with pytest.MonkeyPatch.context() as patch:
        client = tmp_path_factory.mktemp("client")
        wandb_here.seal(patch, client, WANDB_BASE_URL=found.url, WANDB_API_KEY=wandb_here.KEY)
        try:
            wandb_here.wait(found, process)
            yield found
        finally:
            process.terminate()
            process.wait()


@pytest.fixture
def sealed(tmp_path, monkeypatch):
    wandb_here.seal(monkeypatch, tmp_path)
    return tmp_path


def online(folder, name, *more):
    return tiny(folder, *ONLINE, "study=compare", f"run_name={name}", *more)


@pytest.fixture(scope="module")
def sweep(server, tmp_path_factory):
    """The study's folder, after two jobs in one process and the base that they share."""
    folder = tmp_path_factory.mktemp("compare")
    for method in METHODS:
        experiment.run(
            online(folder, method, f"method={method}", "base=shared", *DRAWN), folder / method
        )
    return folder


def wandb_id(folder):
    return json.loads((folder / "wandb-id.json").read_text())["id"]


def runs(folder):
    """Directories and W&B ids of the two jobs and of their base."""
    (base,) = folder.glob("base-*")
    return {path: wandb_id(path) for path in (*map(folder.joinpath, METHODS), base)}


@pytest.mark.slow
def test_every_job_of_a_sweep_is_a_finished_run(server, sweep):
    for folder, identity in runs(sweep).items():
        about, stored = server.introduced(identity), server.run(identity)
        assert (about["groupName"], about["displayName"]) == ("compare", folder.name)
        assert stored["display_name"] == folder.name
        method = summary(folder)["method"]
        assert set(stored["tags"]) == {method, "gfl_tiny", "roadscenes"}
        assert stored["state"] == "finished"
        assert server.exit_codes(identity) == [0]


@pytest.mark.slow
def test_rounds_and_training_arrive(server, sweep):
    for folder, identity in runs(sweep).items():
        history = server.history(identity)
        for index, row in enumerate(summary(folder)["rounds"]):
            numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and v == v}
            assert {k: history[f"round/{k}"][index] for k in numbers} == pytest.approx(numbers)
        assert len(history["train/loss"]) == len(history["train/loss_cls"]) >= 2
        assert len(history["trainer/global_step"]) >= len(history["train/loss"])


@pytest.mark.slow
def test_rounds_are_shown_against_rounds_and_training_against_steps(server, sweep):
    expected = {"train/*": "trainer/global_step", "val/*": "trainer/global_step"}
    for identity in runs(sweep).values():
        assert axes(server, identity) == expected | {"round/*": "round/round"}


def axes(server, identity):
    """The x-axis of every kind of metric, from W&B's own table in a run's config."""
    defined = server.run(identity)["config"]["_wandb"]["value"]["m"]
    return {m["2"]: defined[m["5"] - 1]["1"] for m in defined if "2" in m}


@pytest.mark.slow
def test_the_resolved_configuration_arrives(server, sweep):
    for folder, identity in runs(sweep).items():
        config = server.run(identity)["config"]
        assert config["study"]["value"] == "compare"
        assert config["method"]["value"]["name"] == summary(folder)["method"]
        assert config["recipe"]["value"]["batch_size"] == 4


@pytest.mark.slow
def test_pictures_and_the_table_of_rounds_arrive(server, sweep):
    for folder, identity in runs(sweep).items():
        files = server.files(identity)
        pictures = {content for name, content in files.items() if name.endswith(".png")}
        assert pictures
        assert pictures == {file.read_bytes() for file in (folder / "pictures").glob("*.png")}
        tables = [json.loads(files[name]) for name in files if name.endswith(".table.json")]
        (table,) = [table for table in tables if "layer" not in table["columns"]]
        at = table["columns"].index("params")
        assert [row[at] for row in table["data"]] == [row["params"] for row in rows(folder)]


@pytest.mark.slow
def test_the_pruned_checkpoint_is_an_artifact(server, sweep):
    for folder, identity in runs(sweep).items():
        found = json.loads(server.get(f"/api/v2/runs/{identity}/artifacts"))["artifacts"]
        (model,) = [one for one in found if one["artifact_type"] == "model"]
        about, last = model["metadata"], rows(folder)[-1]
        assert model["name"] == folder.name
        assert (about["params"], about["AP"]) == (last["params"], last["AP"])
        assert about["method"] == summary(folder)["method"]


@pytest.mark.slow
def test_a_finished_job_leaves_its_run_alone(server, sweep):
    before = len(server.record.read_text())
    experiment.run(online(sweep, "l1", "method=l1", "base=shared", *DRAWN), sweep / "l1")
    assert len(server.record.read_text()) == before


@pytest.mark.slow
@needs_chromium
def test_the_compare_page_shows_the_runs(server, sweep, tmp_path):
    jobs = runs(sweep)
    metrics = {metric for identity in jobs.values() for metric in server.history(identity)}
    with opened(f"{server.url}/compare/default/ldt?runs={','.join(jobs.values())}") as found:
        charts = found.page.locator(".chart-container canvas")
        found.page.wait_for_function(
            "count => document.querySelectorAll('.chart-container canvas').length >= count",
            arg=len(metrics),
        )
        assert charts.count() == len(metrics)
        listed = found.page.locator(".checkbox-wrapper").all_inner_texts()
        assert all("finished" in text for text in listed if text.split()[0] in METHODS)
        assert {text.split()[0] for text in listed} >= {folder.name for folder in jobs}
        titles = set(found.page.locator("h4").all_inner_texts())
        assert {"mAP", "params", "loss_cls"} <= titles
        found.page.screenshot(path=str(tmp_path / "compare.png"))


# Ends other than success ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_failing_job_of_a_sweep_arrives_as_failed(server, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("detector.checkpoint")

    monkeypatch.setattr(DetectorModule, "training_step", fail)
    experiment.run(online(tmp_path, "failing"), tmp_path / "run", in_sweep=True)
    assert "detector.checkpoint" in summary(tmp_path / "run")["error"]
    assert server.exit_codes(wandb_id(tmp_path / "run")) == [1]


@pytest.mark.slow
def test_an_interrupted_job_arrives_as_failed(server, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(DetectorModule, "training_step", interrupt)
    with pytest.raises(SystemExit):
        experiment.run(online(tmp_path, "interrupted"), tmp_path / "run")
    assert server.exit_codes(wandb_id(tmp_path / "run")) == [1]


@pytest.mark.slow
def test_a_resumed_job_goes_on_in_the_same_run(server, tmp_path, monkeypatch):
    more = ["recipe.epochs=2", "report.pictures=0", "logger.checkpoint=false"]
    config = online(tmp_path, "resumed", "method=none", *more)
    with monkeypatch.context() as patch:
        patch.setattr(DetectorModule, "training_step", until_second_epoch)
        with pytest.raises(ZeroDivisionError):
            experiment.run(config, tmp_path / "run")
    experiment.run(config, tmp_path / "run")
    identity = wandb_id(tmp_path / "run")
    assert server.exit_codes(identity) == [1, 0]
    history = server.history(identity)
    assert (len(history["train/loss"]), history["round/round"]) == (4, [0])
    found = json.loads(server.get(f"/api/v2/runs/{identity}/artifacts"))["artifacts"]
    assert [one for one in found if one["artifact_type"] == "model"] == []


def until_second_epoch(module, batch, index, plain=DetectorModule.training_step):
    return plain(module, batch, index) if module.current_epoch == 0 else 1 / 0


# Offline --------------------------------------------------------------------------------------


def finished(folder):
    """What a job leaves behind that W&B is given."""
    folder.mkdir(exist_ok=True)
    (folder / "round-0.ckpt").write_bytes(b"weights")
    about = {"run": "one", "study": "compare", "detector": "d", "dataset": "s", "method": "none"}
    about |= {"seed": 0, "checkpoint": "round-0.ckpt", "rounds": [{"round": 0, "AP": 0.5}]}
    (folder / "summary.json").write_text(json.dumps(about))
    return folder


def log(folder, value, **more):
    with WandbRun(str(folder), **ABOUT, **more) as run:
        run.log_metrics({"round/AP": value, "round/AP_large": float("nan")}, step=1)


@pytest.mark.slow
def test_offline_runs_arrive_after_a_sync(server, tmp_path):
    folder = finished(tmp_path / "run")
    (folder / "round-0.ckpt").rename(folder / "hidden")
    with pytest.raises(ValueError, match=r"round-0\.ckpt"):
        log(folder, 0.25)
    (folder / "hidden").rename(folder / "round-0.ckpt")
    log(folder, 0.5)
    parts = sorted(map(str, (folder / "wandb").glob("offline-run-*")))
    assert len(parts) == 2
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *parts], capture_output=True, text=True, check=True
    )
    identity = wandb_id(folder)
    history = server.history(identity)
    assert history["round/AP"] == [0.25, 0.5], done.stderr
    assert "round/AP_large" not in history
    assert sorted(server.exit_codes(identity)) == [0, 1]


@pytest.mark.slow
def test_offline_needs_no_account_and_stays_in_the_folder(sealed):
    folder = finished(sealed / "run")
    before = {file for file in sealed.rglob("*") if file.is_file()}
    log(folder, 0.5)
    made = {file for file in sealed.rglob("*") if file.is_file()} - before
    made.remove(folder / "wandb-id.json")
    assert any(file.suffix == ".wandb" for file in made)
    assert all((folder / "wandb") in file.parents for file in made if "WANDB_" not in str(file))
    assert not (sealed / "netrc").exists()


def test_only_the_first_process_speaks(sealed, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    log(sealed / "run", 0.5)
    assert not (sealed / "run").exists()


def test_online_without_an_account_says_what_to_type(sealed, monkeypatch):
    monkeypatch.setattr(wandb_logger, "unreachable", lambda: "")
    with pytest.raises(ValueError, match=r"wandb login`, or set WANDB_API_KEY.*mode=offline"):
        WandbRun(str(sealed), **ABOUT, mode="online")


def test_an_unknown_mode_names_the_choices(sealed):
    with pytest.raises(ValueError, match=r"logger.mode='of'; allowed: offline, online"):
        WandbRun(str(sealed), **ABOUT, mode="of")


def test_an_id_stands_for_a_directory(tmp_path):
    one, two = (run_id(tmp_path / name, "compare", "one") for name in ("one", "two"))
    assert one != two
    assert run_id(tmp_path / "one", "compare", "one") == one


def test_a_directory_of_an_earlier_version_keeps_its_id(tmp_path):
    """It was derived from study and name: the W&B runs of today go on."""
    (tmp_path / "wandb").mkdir()
    assert run_id(tmp_path, "compare", "one") == "1e0dfe5c2178d3f1"


@pytest.fixture(params=["refused", "silent"])
def away(request):
    """Address of a server that refuses connections, or takes them and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "silent":
            server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.slow
def test_a_server_that_is_away_is_told_and_the_run_can_go_on(away, tmp_path, monkeypatch):
    wandb_here.seal(monkeypatch, tmp_path, WANDB_BASE_URL=away, WANDB_API_KEY=wandb_here.KEY)
    monkeypatch.setattr(wandb_logger, "PATIENCE", 0.2)
    with pytest.raises(ValueError, match=rf"{away} does not answer.*logger\.mode=offline"):
        WandbRun(str(tmp_path / "run"), **ABOUT, mode="online")
    folder = finished(tmp_path / "run")
    log(folder, 0.5, mode="online", offline_if_unreachable=True)
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.slow
def test_a_repeated_run_is_a_run_of_its_own(tmp_path):
    plain = OmegaConf.to_container(tiny(tmp_path, "logger=wandb", "study=first"), resolve=True)
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(plain))
    config = repetition.renamed(repetition.load_config(tmp_path), tmp_path / "again" / "one")
    assert (config.study, config.run_name) == ("again", "one")
    assert (config.logger.study, config.logger.name) == ("again", "one")
    without = repetition.renamed(tiny(tmp_path), tmp_path / "again" / "one")
    assert without.logger == {}
