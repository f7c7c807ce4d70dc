"""W&B's client and a server of its protocol, sealed into a folder."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
import wandb
from forked import PATIENCE

PROGRAM = Path(__file__).with_name("wandb_server.py")
KEY = "local" + 40 * "0"
GIVEN = {
    "WANDB_BASE_URL": "http://127.0.0.1:9",  # no test asks a server outside of this machine
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_INIT_TIMEOUT": "300",  # seconds, for a busy machine; so is the next
    "WANDB_HTTP_TIMEOUT": "120",
}
PLACES = (
    "WANDB_DIR",
    "WANDB_CACHE_DIR",
    "WANDB_CONFIG_DIR",
    "WANDB_DATA_DIR",
    "WANDB_ARTIFACT_DIR",
)


def seal(patch, folder, **settings):
    """Keep W&B's client inside of `folder`, without an account unless `settings` has one."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        patch.delenv(name)
    for name, value in (GIVEN | settings).items():
        patch.setenv(name, value)
    for name in PLACES:
        (folder / name).mkdir(exist_ok=True)
        patch.setenv(name, str(folder / name))
    patch.setenv("NETRC", str(folder / "netrc"))
    wandb.teardown()  # it keeps the environment of its first use


@dataclass
class Server:
    """openwandb, running; what it has stored and what was sent to it."""

    url: str
    record: Path

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE) as reply:
            return reply.read()

    def run(self, run_id):
        """A stored run: state, config, summary, tags."""
        return json.loads(self.get(f"/api/v2/runs/{run_id}"))["run"]

    def history(self, run_id):
        """Values of a run by metric, in order of arrival."""
        found = json.loads(self.get(f"/api/v2/runs/{run_id}/metrics"))["metrics_by_key"]
        return {key: [point["value"] for point in points] for key, points in found.items()}

    def files(self, run_id):
        """Contents of a run's files by name."""
        found = json.loads(self.get(f"/api/v1/runs/{run_id}/files"))["files"]
        place = f"/files/default/ldt/{run_id}"
        return {file["name"]: self.get(f"{place}/{file['name']}") for file in found}

    def _sent(self):
        return [json.loads(line) for line in self.record.read_text().splitlines()]

    def exit_codes(self, run_id):
        """What the client reported at the ends of a run; openwandb itself calls all finished."""
        ends = [r["sent"] for r in self._sent() if f"/{run_id}/file_stream" in r["path"]]
        return [sent["exitcode"] for sent in ends if sent.get("complete")]

    def introduced(self, run_id):
        """How the client introduced a run: its group, name, tags."""
        asked = [r["sent"].get("variables") or {} for r in self._sent() if r["path"] == "/graphql"]
        flat = [variables.get("input", variables) for variables in asked]
        return next(v for v in flat if v.get("name") == run_id and v.get("groupName"))


def start(folder):
    """A server on a free port, and its process."""
    pytest.importorskip("openwandb", reason="no local W&B server: pip install openwandb")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    record = folder / "record.jsonl"
    record.touch()
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), str(port), str(record)],
        env=os.environ | {"OPENWANDB_DATA_DIR": str(folder / "server")},
        stdout=(folder / "server.log").open("wb"),
        stderr=subprocess.STDOUT,
    )
    return Server(f"http://127.0.0.1:{port}", record), process


def wait(server, process):
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return server.get("/login")
        except OSError:
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline
            time.sleep(0.2)
