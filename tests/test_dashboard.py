"""The workspace and the report of a study, as the library writes them; saving them; errors."""

import json
from types import SimpleNamespace

import pytest
import wandb
import wandb_here

from ldt.cli import main
from ldt.report import workspaces

COSTS = ["round/params", "round/multiply_adds", "round/latency_ms"]
STUDY = workspaces.Study("me", "ldt", 'l1\'s "first"', ("train/loss_cls", "train/loss_ld"))


@pytest.fixture
def section():
    """The one section of a workspace's spec that holds everything."""
    model = workspaces.workspace(STUDY)._to_model()
    return json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))["section"]


@pytest.fixture
def blocks():
    model = workspaces.report(STUDY)._to_model()
    return json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))["blocks"]


def grids(blocks):
    return [block["metadata"] for block in blocks if block["type"] == "panel-grid"]


def check_panels(panels):
    kinds = {panel["viewType"] for panel in panels}
    assert kinds == {"Scatter Plot", "Run History Line Plot", "Media Browser", "Run Comparer"}
    scatters = [p["config"] for p in panels if p["viewType"] == "Scatter Plot"]
    assert [p["xAxis"] for p in scatters] == [f"summary:{cost}" for cost in COSTS]
    assert {p["yAxis"] for p in scatters} == {"summary:round/mAP"}
    assert all(p["showMaxYAxisLine"] for p in scatters)  # the Pareto front
    lines = [p["config"] for p in panels if p["viewType"] == "Run History Line Plot"]
    drawn = {p["metrics"][0]: p["xAxis"] for p in lines}
    rounds = ["round/AP", "round/mAP", *COSTS]
    losses = dict.fromkeys(STUDY.losses, "trainer/global_step")
    assert drawn == dict.fromkeys(rounds, "round/round") | losses


def check_runs(runs):
    (condition,) = runs["filters"]["filters"]
    assert condition["key"] == {"section": "run", "name": "group"}
    assert (condition["op"], condition["value"]) == ("=", STUDY.name)
    columns = runs["runFeed"]["columnOrder"]
    assert {"run:displayName", "config:method.value.name", "summary:round/mAP"} <= set(columns)


def test_a_workspace_compares_the_runs_of_its_study(section):
    sections = section["panelBankConfig"]["sections"]
    assert all(part["isOpen"] for part in sections)
    check_panels([panel for part in sections for panel in part["panels"]])
    check_runs(section["runSets"][0])


def test_a_report_shows_the_same_with_a_table_of_the_runs(blocks):
    check_panels(
        [panel for grid in grids(blocks) for panel in grid["panelBankSectionConfig"]["panels"]]
    )
    for grid in grids(blocks):
        check_runs(grid["runSets"][0])
    text = " ".join(part["text"] for block in blocks for part in block["children"])
    assert "Pareto front" in text
    assert [grid.get("hideRunSets", False) for grid in grids(blocks)].count(False) == 1


def test_panels_of_a_report_do_not_overlap(blocks):
    for grid in grids(blocks):
        places = [panel["layout"] for panel in grid["panelBankSectionConfig"]["panels"]]
        cells = [
            (x, y)
            for place in places
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        assert len(cells) == len(set(cells))


class Service:
    """The transport below `wandb.Api`: keeps what is asked, and saves any view."""

    app_url = "https://wandb.here"

    def __init__(self):
        self.asked = []

    def execute_graphql(self, query, variables):
        self.asked.append(variables)
        view = {key: variables[key] for key in ("name", "displayName", "description", "spec")}
        project = {"name": variables["projectName"], "entityName": variables["entityName"]}
        return {"upsertView": {"view": view | {"id": "VmlldzoxMjM=", "project": project}}}


class Account:
    """`wandb.Api`, as far as it is used, with the summaries of a study's runs."""

    default_entity = "me"
    summaries = [{"train/loss_cls": 1.0, "round/AP": 0.5}, {"train/loss_ld": 1.0, "train/lr": 1.0}]

    def __init__(self, service):
        self._service_api = service

    def runs(self, path, filters):
        chosen = (path, filters) == ("me/ldt", {"group": STUDY.name})
        return [SimpleNamespace(summary=one) for one in self.summaries] if chosen else []

    def projects(self, entity):
        return [SimpleNamespace(name="ldt")]


@pytest.fixture
def service(monkeypatch):
    found = Service()
    monkeypatch.setattr(wandb, "Api", lambda: Account(found))
    return found


def test_both_are_saved_and_their_addresses_printed(service, capsys):
    main(["dashboard", STUDY.name])
    assert [variables["type"] for variables in service.asked] == ["project-view", "runs"]
    for variables in service.asked:
        assert (variables["entityName"], variables["projectName"]) == ("me", "ldt")
        assert STUDY.name in variables["displayName"]
        assert "train/loss_ld" in variables["spec"]
        assert "train/lr" not in variables["spec"]
    workspace, report = capsys.readouterr().out.splitlines()
    assert workspace.startswith("workspace: https://wandb.here/me/ldt?nw=")
    assert report.startswith("report: https://wandb.here/me/ldt/reports/")


def refused(capsys, study, code=2):
    with pytest.raises(SystemExit) as ended:
        main(["dashboard", study])
    assert ended.value.code == code
    return capsys.readouterr().err


def test_without_an_account_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    wandb_here.seal(monkeypatch, tmp_path)
    told = refused(capsys, "compare")
    assert "Run `wandb login`, or set WANDB_API_KEY" in told


def test_a_study_without_runs_on_the_server_says_how_they_come_there(service, capsys):
    told = refused(capsys, "compare")
    assert "me/ldt has no run of the study 'compare'" in told
    assert "wandb sync runs/compare/*/wandb/offline-run-*" in told


def test_a_server_that_fails_is_told_with_what_it_was_asked(service, monkeypatch, capsys):
    monkeypatch.setattr(service, "execute_graphql", lambda *_, **__: {}["upsertView"])
    told = refused(capsys, STUDY.name, code=1)
    assert "was asked to save a workspace and a report and failed: 'upsertView'" in told


@pytest.mark.slow
def test_a_server_without_workspaces_is_told(tmp_path, monkeypatch, capsys):
    server, process = wandb_here.start(tmp_path)
    given = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": wandb_here.KEY}
    wandb_here.seal(monkeypatch, tmp_path, **given)
    try:
        wandb_here.wait(server, process)
        told = refused(capsys, "compare")
    finally:
        process.terminate()
        process.wait()
    assert "was asked for the runs of the default entity/ldt and failed" in told
    assert "only imitate W&B's uploads have no workspaces" in told
