"""`ldt`, `run.py` and the older addresses: help at once, and one convention of exit codes."""

import contextlib
import json
import logging
import os
import pickle
import re
import resource
import sys
from pathlib import Path
from typing import get_args

import click
import pytest
from hydra.core.utils import JobReturn, JobStatus
from short_runs import ROOT, python, tiny
from summaries import finished

import ldt
from ldt import experiment
from ldt.cli import main
from ldt.cli.commands import RUNTIMES
from ldt.cli.commands import ldt as commands
from ldt.cli.exit_codes import exit_codes
from ldt.cli.study_table import end_sweep
from ldt.cli.sweep_progress import PLACE, SweepProgress, report_of
from ldt.config import DatasetConfig
from ldt.config.kinds import RuntimeName
from ldt.criteria.methods import find_method
from ldt.deployment import prediction, to_mmdet
from ldt.progress import console
from ldt.runs.files import write_json
from ldt.runs.refusal import Failed, Refused, is_refusal, one_line, refused, refusing

TESTS = ROOT / "tests"
HEAVY = (
    "torch",
    "numpy",
    "pandas",
    "matplotlib",
    "plotly",
    "wandb",
    "lightning",
    "mmdet",
    "optuna",
)
WATCHED = f"""
import atexit, sys
atexit.register(lambda: sys.stderr.write(" ".join(m for m in {HEAVY} if m in sys.modules)))
from ldt.cli import main
main(sys.argv[1:])
"""
NAN = float("nan")
OLD = ("report", "figures", "export", "predict")


def refusal(capsys, *arguments, code=2):
    """The only line on stderr of a command that ends with an exit code, 2 where none is given."""
    capsys.readouterr()
    handlers = list(logging.root.handlers)
    try:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
    finally:  # Hydra would go on logging into the folder of a refused run
        logging.root.handlers[:] = handlers
    out, err = capsys.readouterr()
    assert ended.value.code == code
    assert all(re.match(r"\d\d:\d\d:\d\d  ", line) for line in out.splitlines())  # signs of life
    (line,) = err.splitlines()
    return line.removeprefix("error: ")


def test_an_error_is_a_line_that_can_be_read_and_ends():
    assert one_line("a\n b\x1b[31m") == "a b\N{REPLACEMENT CHARACTER}[31m"
    assert one_line("x" * 100_000) == "x" * 2000 + "... (100,000 characters)"


# Targets --------------------------------------------------------------------------------------


@pytest.fixture
def taken(tmp_path):
    """Places that nothing can be written at, by what is told of them."""
    for name in ("file.csv", "round-0.ckpt", "image.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    (tmp_path / "nowhere").symlink_to("missing")
    proc = {Path("/proc/a.csv"): "/proc takes no files"}  # although its permissions say so
    return (proc if Path("/proc/self").exists() else {}) | {
        tmp_path / "folder.csv": "is a folder, not a file to write",
        tmp_path / "pipe.csv": "is a pipe or a device, not a file to write",
        tmp_path / "file.csv/a.csv": "file.csv is not a folder",
        tmp_path / "nowhere/a.csv": "nowhere is not a folder",
        tmp_path / "loop.csv": "symbolic links",
        tmp_path / f"{300 * 'a'}.csv": "name too long",
    }


WRITING = {  # a command that writes a file, up to its name
    "report": ["report", "study", "--format", "csv", "--out"],
    "prune": ["prune", __file__, __file__, __file__, "--rate", "0.3", "--out"],
    "export": ["export", __file__, "--format", "onnx"],
}


@pytest.mark.parametrize("name", WRITING)
def test_a_file_that_cannot_be_written_is_told_before_any_work(name, taken, capsys):
    for file, reason in taken.items():
        assert reason in refusal(capsys, *WRITING[name], file)


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("predict", ["predictions.json", "images.json", "pictures/0001.jpg"]),
        ("export", ["config.py", "weights.pth"]),
    ],
)
def test_a_folder_that_cannot_be_written_is_told_before_any_work(
    name, inside, taken, tmp_path, capsys
):
    def told(folder):
        out = ["image.png", "--out", folder] if name == "predict" else [folder]
        return refusal(capsys, name, tmp_path / "round-0.ckpt", *out)

    with contextlib.chdir(tmp_path):
        for folder in ("file.csv", "pipe.csv", "nowhere"):
            assert f"{folder} is not a folder" in told(folder)
        for number, file in enumerate(inside):
            (tmp_path / f"{number}" / file).mkdir(parents=True)
            assert "is a folder, not a file to write" in told(f"{number}")


# Help -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(commands.commands))
def test_help_shows_an_example_and_imports_nothing_heavy(name, tmp_path):
    done = python("-c", WATCHED, name, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    _, _, examples = done.stdout.partition("Example")
    assert f"ldt {name} " in examples
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_without_a_command_the_commands_are_shown(tmp_path):
    for arguments in ([], ["--help"]):
        done = python("-c", WATCHED, *arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert all(f"\n  {name} " in done.stdout for name in commands.commands)
        assert "ldt report runs/default" in done.stdout


@pytest.mark.slow
def test_hydras_help_costs_little_more_than_composing(tmp_path):
    """Hydra would copy every schema for each of its groups: a second of 1.4 in all."""

    def seconds(*arguments):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python(str(ROOT / "run.py"), *arguments, cwd=tmp_path).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    ratios = [seconds("--help") / seconds("--cfg", "job") for _ in range(2)]
    assert min(ratios) < 1.6


@pytest.mark.slow
@pytest.mark.parametrize("name", OLD)
def test_an_older_address_is_the_same_command(name, tmp_path, capsys):
    main([name, "--help"])
    done = python("-m", f"ldt.{name}", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == capsys.readouterr().out


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["report", "{here}/no"], "no study at {here}/no; studies in {here}: none"),
        (["report", "{here}"], "no finished run in {here}, which has 0 runs"),
        (["figures", "channels", "{here}"], "give the directory of a run, runs/<study>/<run>"),
        (["figures", "curves", "{here}/no"], "no study at {here}/no"),
        (["export", "{here}/no.ckpt", "{here}/out"], "no checkpoint at '{here}/no.ckpt'"),
        (["predict", "{here}/no.ckpt", "{here}/a.png"], "no checkpoint at '{here}/no.ckpt'"),
        (["predict", __file__, "{here}/a.png"], "no image or folder at '{here}/a.png'"),
        (["repeat", "{here}/no", "{here}/new"], "give the directory of a run, runs/<study>/<run>"),
        (["layers", "{here}/no"], "no run at {here}/no; expected there"),
        (["report"], "Missing argument 'STUDY' (see ldt report --help)"),
        (["report", "a", "--format", "pdf"], "'pdf' is not one of 'html', 'markdown', 'latex'"),
        (["expotr", "a"], "No such command 'expotr'"),
    ],
)
def test_what_is_missing_or_misspelt_is_refused_in_one_line(arguments, told, tmp_path, capsys):
    line = refusal(capsys, *(text.format(here=tmp_path) for text in arguments))
    assert told.format(here=tmp_path) in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["report", "{run}"], "is a run; give its study: {study}"),
        (["runs", "{run}"], "is a run; give its study: {study}"),
        (["forget", "{run}", "--failed"], "is a run; give its study: {study}"),
        (["figures", "curves", "{run}/summary.json"], "no study at {run}/summary.json"),
        (["repeat", "{run}", "{run}/summary.json"], "summary.json is a file; type a new folder"),
        (["repeat", "{run}", "{run}"], "is the run itself; type a new folder"),
    ],
)
def test_a_run_or_a_file_in_place_of_a_folder_is_refused(arguments, told, tmp_path, capsys):
    run = tmp_path / "study" / "run"
    run.mkdir(parents=True)
    (run / "summary.json").write_text("{}")
    places = {"run": run, "study": run.parent}
    line = refusal(capsys, *(text.format(**places) for text in arguments))
    assert told.format(**places) in line
    assert list(tmp_path.rglob("*")) == [run.parent, run, run / "summary.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("dataset.root=/nowhere", "does not apply to generated scenes; type dataset.cache="),
        ("detector.size=huge", "detector.size=huge: the data set has no such size"),
    ],
)
def test_what_hydra_wraps_is_told_alone(override, told, capsys):
    assert told in refusal(capsys, "data", override)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["detector=gfll"], "detector=gfll: did you mean gfl? choose from atss, atss_tiny, gfl"),
        (["hydra/launcher=x"], "hydra/launcher=x: choose from basic, joblib"),
        (["detectr=gfl"], "detectr=gfl: unknown key; did you mean detector? Type detector=gfl"),
        (["prune.rat=0.5"], "prune.rat=0.5: unknown key; did you mean prune.rate? Type prune."),
        (["+prune.rat=0.5"], "prune.rat=0.5: unknown key; did you mean prune.rate? Type prune."),
        (["-m", "+trainer.max_steps=3,4"], "cannot be set: the loop ends after its last phase"),
        (["prune.rate=abc"], "prune.rate=abc; allowed: a number above 0 and below 1 (e.g. prune."),
        (
            ["prune.rate=30%"],
            "prune.rate=30%; allowed: a number above 0 and below 1 (e.g. prune.rate=0.3)",
        ),
        (["prune.rate=30"], "allowed: a number above 0 and below 1 (e.g. prune.rate=0.3)"),
        (
            ["prune.rounds=1.5"],
            "prune.rounds=1.5; allowed: a whole number of at least 0 (e.g. prune.rounds=",
        ),
        (["-m", "prune.rate=0.5,abc"], "prune.rate=abc; allowed: "),
        (["prune.rate"], "prune.rate has no value; type prune.rate=<value>"),
        (["~prune.rate"], "~prune.rate: a key cannot be deleted; type prune.rate=<value>"),
        (["+prune=oneshot"], "prune is given twice: type prune=<option> once"),
        (["dataset.split_seed=3"], "unknown key here; it belongs to dataset=kitti"),
        (["recipe.optimizer.lrr=3"], "did you mean recipe.optimizer.lr=3? to add it type +recipe"),
        (["+method.gradual.foo=3"], "a key is added below one that is null"),
        (["seed=-1"], "seed=-1; allowed: a whole number of at least 0"),
        (["trainer.threads=0"], "trainer.threads=0; allowed: a whole number of at least 1"),
        (["study=${nope}"], "'nope' not found"),
        (["detector=mmdet"], "detector.config is not set; type detector.config=<value>"),
        (
            ["detector=mmdet", "detector.config=nix.py"],
            "detector.config='nix.py': no such file; give",
        ),
        (["detector.checkpoint=nix.ckpt"], "detector.checkpoint='nix.ckpt': no such file"),
        (["detector.checkpoint="], "detector.checkpoint='': no such file; give one, or detector.c"),
        ([f"detector.checkpoint={__file__}"], "no checkpoint of PyTorch"),
        ([f"detector.config={TESTS / 'reference.txt'}"], "no such file"),
        (
            ["detector=mmdet", "detector.config=mmdet::gfl/gfl_r50_fpn_1x_koko.py"],
            "mmdet has no such config; did you mean mmdet::gfl/gfl_r50_fpn_1x_coco.py? give",
        ),
        (["detector.config=mmdet::"], "mmdet has no such config; give a file"),
        (["detector.config=os.path::x.py"], "os.path has no such config"),
        (["detector.config=/etc/hostname"], "no config of mmdet; give a file"),
        (["detector=GFL"], "detector=GFL: did you mean gfl? choose from"),
        (["dataset=kitti", "dataset.root="], "dataset.root is not set; type dataset.root="),
        (["dataset=kitti", f"dataset.root={TESTS}"], "training/image_2; expected in"),
        (
            ["dataset=coco", f"dataset.root={TESTS}"],
            "annotations/instances_train2017.json; expected",
        ),
        (
            ["dataset=coco", f"dataset.root={TESTS}", "dataset.train_ann=conftest.py"],
            "train2017; type dataset.train_img=<folder of the images>",
        ),
        (
            ["-m", "dataset=coco", "dataset.root=nix", "seed=0,1"],
            "no folder nix; expected there: COCO's folders",
        ),
        (["dataset=kitti"], "dataset.root is not set; type dataset.root=/path/to/kitti (KITTI's"),
        (["dataset=coco", "dataset.root=nix"], "no folder nix; expected there: COCO's folders"),
        (["--config-dir", "nowhere"], "nowhere' not found"),
        (["--config-name", "nope"], "Cannot find primary config 'nope'"),
        (["+hydra.foo=1"], "hydra.foo: unknown key; known in hydra: "),
        (["+hydra.run.dri=x"], "unknown key; did you mean hydra.run.dir? Type hydra.run.dir=..."),
        (
            ["+trainer.devices=2"],
            "+trainer.devices: the key is there already; type trainer.devices",
        ),
        (["detector.size=huge"], "detector.size=huge: the data set has no such size"),
        (["trainer.devices=foo"], "Lightning refuses a key of trainer: `devices`"),
        (["dataset=null"], "a group cannot be null: choose one of its options"),
        (["seed=0", "-m", "prune.rate=0.5,abc"], "prune.rate=abc; allowed: "),
        (["--bogus"], "unrecognized arguments: --bogus; --help shows the groups"),
        (["--run", "--multirun"], "Only one of --run, --multirun"),
        (["--experimental-rerun", "x"], "`ldt repeat` repeats a run"),
    ],
)
def test_what_hydra_cannot_compose_is_refused_in_one_line(
    arguments, told, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert told in refusal(capsys, "run", *arguments)
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.mark.slow
def test_what_is_missing_is_told_before_anything_heavy_is_imported(tmp_path):
    done = python("-c", WATCHED, "run", "dataset=kitti", "dataset.root=nix", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no folder nix; expected there: KITTI's folders")


@pytest.mark.slow
def test_errors_before_training_are_refusals_and_later_ones_are_not(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("no")

    for place, name, expected in (
        (experiment, "opened_logger", 1),
        (experiment, "build_schedule", 1),
        (experiment, "build_trainer", 1),
        (experiment, "build_module", 1),
        (experiment.L.Trainer, "fit", 0),
        (experiment.layers, "write_inventory", 0),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, broken)
            if name == "write_inventory":
                patch.setattr(experiment, "_execute", lambda *_: {"rounds": [{}]})
            with pytest.raises(ValueError, match="no") as raised:
                experiment.run(tiny(tmp_path, "report.figures=true"), tmp_path / name)
        assert is_refusal(raised.value) == expected, name
        if expected:
            assert not (tmp_path / name).exists()
            continue
        found = json.loads((tmp_path / name / "summary.json").read_text())
        assert found == {"status": "failed", "error": "ValueError: no"}


def ended(*values):
    """Jobs of a sweep with results, as joblib and submitit hand them over."""
    jobs = [JobReturn(_return_value=value, status=JobStatus.COMPLETED) for value in values]
    return pickle.loads(pickle.dumps(jobs))


def code_of(study, jobs):
    """The exit code of a sweep."""
    try:
        end_sweep(study, jobs)
    except SystemExit as ended:
        return ended.code
    return 0


def test_a_sweep_of_refused_jobs_alone_ends_as_a_refusal(tmp_path):
    refused_, failed = Refused("nan"), Failed("nan")
    for values, code in (
        ([1.0, refused_], 1),
        ([refused_, (refused_, refused_)], 2),
        ([refused_, failed], 1),
        ([failed], 1),
        ([1.0, (0.5, 3.0)], 0),
    ):
        assert code_of(tmp_path, ended(*values)) == code


def test_a_finished_run_without_a_metric_is_no_failure(tmp_path):
    assert code_of(tmp_path, ended(NAN, (NAN, 3.0))) == 0


def test_older_runs_of_the_study_do_not_count_and_are_not_shown(tmp_path, capsys):
    for name in ("mine", "other"):
        finished(tmp_path, name)
    (tmp_path / "old").mkdir()
    write_json(tmp_path / "old/summary.json", {"status": "failed", "error": "ValueError: old"})
    jobs = ended(1.0, 2.0)
    for job, name in zip(jobs, ("mine", "other"), strict=True):
        place = {"hydra": {"runtime": {"output_dir": str(tmp_path / name)}}}
        job.hydra_cfg = experiment.OmegaConf.create(place)
        job.overrides = ["study=s", f"method={name}"]
    assert code_of(tmp_path, jobs) == 0
    text = capsys.readouterr().out
    assert "2 finished, 0 failed, 0 unfinished; 1 more in the study" in text
    assert "ValueError: old" not in text
    for name in ("mine", "other"):
        (line,) = (line for line in text.splitlines() if f"method={name}" in line)
        assert line.split()[1:6] == ["finished", "AP", "0.400", "0.390", "-0.010"]


def test_the_table_of_a_sweep_shows_every_job_and_an_estimate(in_terminal):
    shown = in_terminal(80)
    sweep = SweepProgress()
    sweep.add([["study=s", f"seed={seed}", "method=l1"] for seed in range(4)])
    for number, (state, value) in enumerate((("finished", 0.4321), ("failed", Failed("nan")))):
        sweep.start(number)
        sweep.end(number, state, value)
        sweep.jobs[number].seconds = 100
    sweep.start(2)
    console.terminal().print(sweep.draw())
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("2 of 4 jobs ended, about 3:20 left")
    rows = {line.split()[1]: line.split()[2:] for line in lines[3:]}
    assert rows == {
        "seed=0": ["finished", "0.432", "1:40"],
        "seed=1": ["failed", "-", "1:40"],
        "seed=2": ["running", "0:00"],
        "seed=3": ["waiting"],
    }


def test_jobs_of_other_processes_report_to_the_table(tmp_path, in_terminal, monkeypatch):
    shown = in_terminal(80)
    sweep = SweepProgress(tmp_path / ".sweep")
    sweep.add([[f"seed={seed}"] for seed in range(3)])
    monkeypatch.setenv(PLACE, f"1:{sweep.place}")
    reports = [report_of(number) for number in range(2)]
    for report in reports:
        report.begin()
    sweep.read()
    assert [job.state for job in sweep.jobs] == ["running", "running", "waiting"]
    (sweep.place / "1.err").write_text("error: seed=1 is bad\n")
    reports[0].end("finished", 0.25)
    reports[1].end("refused", NAN)
    sweep.read()
    sweep.read()
    assert [job.state for job in sweep.jobs] == ["finished", "refused", "waiting"]
    assert sweep.jobs[0].result == 0.25
    assert shown.getvalue() == "error: seed=1 is bad\n"
    sweep.close()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(PLACE, f"{os.getpid()}:{sweep.place}")
    assert report_of(0) is None  # the sweep's own process


# The convention -------------------------------------------------------------------------------


def raised_by_ours():
    prediction.find_images(["/nowhere/at/all"])


def wrong_value():
    find_method("nothing")


def raised_by_a_library():
    int("seven")


def disk_full():
    raise OSError(28, "No space left on device")


def refused_wrong_value():
    with refusing():
        wrong_value()


def refused_lines():
    raise refused(ValueError("one\n  two"))


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("function", "code", "told"),
    [
        (raised_by_ours, 1, "error: no image or folder at '/nowhere/at/all'"),
        (wrong_value, 1, "error: criterion='nothing' is unknown"),
        (disk_full, 1, "error: [Errno 28] No space left on device"),
        (refused_wrong_value, 2, "error: criterion='nothing' is unknown"),
        (refused_lines, 2, "error: one two"),
        (interrupted, 130, "error: interrupted"),
        (raised_by_a_library, 1, None),
        (lambda: 1 / 0, 1, None),
    ],
)
def test_every_error_has_its_exit_code(function, code, told, capsys):
    with pytest.raises(SystemExit) as ended, exit_codes():
        function()
    assert ended.value.code == code
    text = capsys.readouterr().err
    if told is None:
        assert text.startswith("Traceback")
    else:
        assert text.startswith(told)
        assert text.count("\n") == 1


def test_only_the_named_kinds_become_refusals():
    for kinds, expected in (((), True), ((FileNotFoundError,), False), ((ValueError,), True)):
        with pytest.raises(ValueError, match="seven") as raised, refusing(*kinds):
            raised_by_a_library()
        assert is_refusal(raised.value) == expected


def test_all_is_well_without_an_error():
    with exit_codes():
        pass


# Names of the package -------------------------------------------------------------------------


def test_a_module_that_is_also_a_function_is_the_function_when_imported():
    import ldt.export
    import ldt.predict

    assert ldt.export is to_mmdet.export
    assert ldt.predict is prediction.predict
    assert sys.modules["ldt.export"] is to_mmdet.export


def test_every_public_name_is_found_and_others_are_refused():
    assert all(getattr(ldt, name) is not None for name in ldt.__all__)
    with pytest.raises(AttributeError, match="'ldt' has no attribute 'nothing'"):
        _ = ldt.nothing  # type: ignore[attr-defined]


def test_the_package_is_imported_without_anything_heavy(tmp_path):
    code = f"import sys, ldt; print([m for m in {HEAVY} if m in sys.modules])"
    assert python("-c", code, cwd=tmp_path).stdout == "[]\n"


def test_commands_have_no_second_definition():
    assert all(isinstance(command, click.Command) for command in commands.commands.values())
    assert set(OLD) < set(commands.commands)


def test_what_the_commands_repeat_for_a_fast_help_is_what_they_mean():
    assert get_args(RuntimeName) == RUNTIMES
    options = {option.name: option for option in commands.commands["predict"].params}
    assert options["max_pixels"].default == DatasetConfig.max_pixels
