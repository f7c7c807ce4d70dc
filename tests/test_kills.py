"""A run that is killed at any moment ends as if it had not been: see kills.py."""

from pathlib import Path

import forked
import pytest
from sampled import sampled

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kills"), sampled([("ldt", 3), ("random", 1), ("group_fisher", 1)])
)
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, method, kills):
    options = ["--kills", str(kills), "--method", method, "--seed", str(kills)]
    done = forked.run(str(HERE / "kills.py"), *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{kills} kills, 0 with a difference"
