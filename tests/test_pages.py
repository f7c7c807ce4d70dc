"""README and docs/: links lead somewhere, commands work, refusals are real, the site builds."""

import itertools
import os
import re
import shlex
import subprocess
import sys

import forked
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from short_runs import ROOT, TINY, command
from small import composed
from test_cli import refusal
from test_pruning_command import own  # noqa: F401  (a fixture)

import ldt
from ldt import build
from ldt.cli.commands import ldt as commands
from ldt.config import as_dict
from ldt.config.keys import check_keys
from ldt.config.values import check_against_schema
from ldt.data.kitti import KittiDataModule

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *DOCS]
PAGES += sorted(ROOT.glob("experiments/**/*.md"))
SET_UP = ("source", "pip", "wandb", "srun", "timeout")  # of the machine, not of ldt


def blocks(page, language):
    """The code blocks of a page, with continued lines joined and comments left out."""
    found = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [re.sub(r"(?m)(^|\s)#.*$", "", text.replace("\\\n", " ")) for text in found]


def shell(page):
    """The commands of a page, each as its arguments."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines() if line.strip()]
    parts = [part for line in lines for part in line.split("&&")]
    words = [shlex.split(re.sub(r"<[^>]*>", "x", part)) for part in parts]
    return [given for given in words if given and given[0] not in SET_UP]


def slug(heading):
    """The anchor of a heading, as GitHub and mkdocs make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def jobs(overrides):
    """The first and the last job of a sweep, or the only one."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = [
        [f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [o.input_line]
        for o in parsed
    ]
    every = list(itertools.product(*choices))
    return [every[0], every[-1]] if every[1:] else every


def check(given, carefully):
    """Check a command without running it."""
    program, *rest = given
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"(?m)^{target}:", makefile) for target in rest)
    elif program == "python" and rest[0] != "run.py":
        assert rest[0] == "-m" or (ROOT / rest[0]).is_file()
    elif program == "python" or rest[:1] in (["run"], ["data"]):
        overrides = [text for text in rest[1:] if not text.startswith("-") and text != "job"]
        for job in jobs(overrides)[: 2 if carefully else 1]:
            found = composed(*(text for text in job if not text.startswith("hydra")), "run_name=x")
            check_keys(found)
            check_against_schema(as_dict(found, resolve=False))
            if carefully:
                build.check_config(found)
                build.build_schedule(found)
    else:
        assert program == "ldt"
        commands.make_context("ldt", rest)
        name, *arguments = rest
        commands.commands[name].make_context(name, arguments)


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", file.read_text())
            assert anchor in map(slug, headings), target


@pytest.mark.slow
@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_commands_are_valid(page, monkeypatch):
    monkeypatch.setattr("ldt.cli.commands._is_there", lambda path: True)
    for given in shell(page):
        check(given, carefully=page == README)


def test_the_reader_of_commands_sees_them():
    found = [" ".join(given) for given in shell(README)]
    assert "make demo" in found
    assert any(text.startswith("ldt run -m method=ldt,l1 ") for text in found)
    assert len(found) >= 12
    with pytest.raises(Exception, match="rat"):
        check(["ldt", "run", "prune.rat=0.3"], carefully=False)
    with pytest.raises(Exception, match="nothing"):
        check(["ldt", "report", "runs", "--nothing"], carefully=False)


# What README tells the three users to do, with small settings ----------------------------------


@pytest.mark.slow
def test_the_commands_of_the_engineer_work(own, tmp_path):  # noqa: F811
    config, weights, data = map(str, own)
    image = next((own[2] / "training/image_2").iterdir())
    places = {"my_config.py": config, "my_weights.pth": weights, "/data/mine": data}
    places["photos"] = str(image)
    few = ["--images", "4", "--val", "4"]
    more = {"prune": few, "sensitivity": [*few, "--rate", "0.5"]}
    order = ["prune", "sensitivity", "export", "predict"]
    steps = [given for given in shell(README) if given[1:2] and given[1] in order]
    steps = [given for given in steps if "latency" not in given]  # tests/test_pruning_command.py
    assert [given[1] for given in steps] == order
    for _, name, *rest in steps:
        arguments = [*(places.get(text, text) for text in rest), *more.get(name, [])]
        done = forked.run("-m", "ldt.cli", name, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert {"pruned.ckpt", "sensitivity.png", "exported/config.py"} <= names
    assert "predictions/predictions.json" in names


@pytest.mark.slow
def test_the_commands_of_the_researcher_work(tmp_path):
    """The sweep as it is, but for the first of the methods, rates and seeds; then its report."""
    (sweep,) = (given for given in shell(README) if "study=compare" in given)
    first = [re.sub(r"^(prune.rate|seed)=([^,]*),.*", r"\1=\2", text) for text in sweep[2:]]
    small = [text for text in TINY if not text.startswith("prune.rate")]
    cache = f"dataset.cache={tmp_path / 'cache'}"
    done = command(*first, *small, "trainer=cpu", cache, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (report,) = (given for given in shell(README) if "runs/compare" in given)
    done = forked.run("-m", "ldt.cli", *report[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tabular" in done.stdout


@pytest.mark.slow
def test_the_python_of_the_readme_works(own, tmp_path, monkeypatch):  # noqa: F811
    (code,) = (block for block in blocks(README, "python") if "ldt.prune" in block)
    monkeypatch.chdir(tmp_path)
    images = KittiDataModule(root=str(own[2]), scale=(128, 64), batch_size=4)
    images.setup("fit")
    exec(code, {"detector": str(own[0]), "images": images})
    assert ldt.load_pruned("pruned.ckpt") is not None


# docs/ ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_refusals_of_the_troubleshooting_page_are_real(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/troubleshooting.md").read_text()
    found = re.findall(r"(?m)^\$ ldt (.*)\nerror: (.*)$", text)
    assert len(found) > 10
    for given, told in found:
        assert refusal(capsys, *shlex.split(given)) == told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_without_network(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    arguments = ("-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site"))
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **nowhere},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert {page.stem for page in DOCS} <= {page.stem for page in pages}
    for page in pages:
        text = page.read_text()
        fetched = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(https?:[^"]*)"', text)
        assert [address for address in fetched if "canonical" not in address] == [], page
    api = (tmp_path / "site/api.html").read_text()
    assert all(f">{name}</span>" in api for name in ldt.__all__)


def test_the_api_page_has_every_public_name():
    text = (ROOT / "docs/api.md").read_text()
    documented = {line.rpartition(".")[2] for line in text.splitlines() if line.startswith(":::")}
    assert set(ldt.__all__) <= documented
