"""Laws of unions of grids, and that Hydra runs them."""

import pytest
from short_runs import ROOT, python

from ldt.config.sweeps import jobs

TWO = [{"detector": "a,b", "rate": "0.1,0.2"}, {"detector": "c", "rate": "0.2,0.3"}]


def told(found):
    return {tuple(sorted(job)) for job in found}


def test_without_grids_there_is_one_product():
    found = jobs({"seed": "0,1", "rate": "0.5"}, [], ["method=ldt"])
    assert told(found) == {
        ("method=ldt", "rate=0.5", "seed=0"),
        ("method=ldt", "rate=0.5", "seed=1"),
    }
    assert jobs({}, [], []) == [[]]


def test_grids_are_united_and_crossed_with_what_is_common():
    found = jobs({"seed": "0,1"}, TWO, [])
    assert len(found) == (4 + 2) * 2
    assert not any({"detector=c", "rate=0.1"} <= set(job) for job in found)


def test_a_job_of_two_grids_runs_once():
    assert len(jobs({}, [{"rate": "0.1,0.2"}, {"rate": "0.2,0.3"}], [])) == 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["detector=c"], 2),  # its own grid only
        (["detector=a,c"], 4),
        (["rate=0.2"], 3),
        (["detector=a", "rate=0.3"], 1),  # not listed in what is left: taken
        (["rate=0.9"], 3),  # listed nowhere: in all
        (["rate=0.10"], 2),  # the number counts, not how it is written
        (["detector=d"], 3),
        (["root=/data"], 6),
    ],
)
def test_the_command_line_chooses_among_the_grids(given, expected):
    found = jobs({}, TWO, given)
    assert len(found) == expected
    for override in given:
        key, _, values = override.partition("=")
        allowed = {f"{key}={value.replace('0.10', '0.1')}" for value in values.split(",")}
        assert all(allowed & set(job) for job in found)


SHOW = f"""
import hydra
from ldt.config import register
register()

@hydra.main(version_base="1.3", config_path={str(ROOT / "conf")!r}, config_name="config")
def main(config):
    print("job", config.run_name, config.study, config.dataset.root)

main()
"""


@pytest.mark.slow
def test_hydra_runs_the_jobs_of_an_experiment(tmp_path):
    (tmp_path / "show.py").write_text(SHOW)
    done = python(
        "show.py", "-m", "experiment=table1_coco", "detector=yolof", "method=ldt,none",
        "dataset.root=/data/${dataset.name}", "~hydra.callbacks.study_table",
        "hydra.sweep.dir=out", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = [line.removeprefix("job ") for line in done.stdout.splitlines() if line[:4] == "job "]
    names = ["none-flops0.7", *(f"ldt-flops{rate}" for rate in (0.2, 0.3, 0.4))]
    assert shown == [f"coco-yolof-{name}-s0 paper /data/coco" for name in names]
