"""The table of an experiment: numbers of the paper, the job of each row, and its runs.

A table row is a row of `expected.csv`. Its columns are overrides that identify the job, followed by
numbers of the paper (:data:`METRICS`). A run belongs to a row if its configuration equals that of
the job except for the seed (:mod:`ldt.runs.identity`), whatever its directory is called, so that
studies can be shared and unrelated runs are ignored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ldt.config import register
from ldt.config.sweeps import jobs
from ldt.runs import identity
from ldt.runs.differences import differences
from ldt.runs.files import read_rows
from ldt.runs.run import Run, open_runs, readable

ROOT = Path(__file__).parents[1]
METRICS = {  # column of expected.csv: key of a run's round, factor to the column's unit
    "AP": ("AP", 100),
    "mAP": ("mAP", 100),
    "removed": ("rate", 100),
    "multiply_adds_G": ("multiply_adds", 1e-9),
    "flops_G": ("multiply_adds", 2e-9),
    "params_M": ("params", 1e-6),
    "cpu_ms": ("cpu_ms", 1),
    "gpu_ms": ("gpu_ms", 1),
}
RUNTIMES = {  # measured besides what the paper has
    "eager_ms": ("eager/cpu_ms", 1),
    "onnxruntime_ms": ("onnxruntime/cpu_ms", 1),
    "openvino_ms": ("openvino/cpu_ms", 1),
}
SMALL = {  # replacements for the paper's in `<experiment>_small`
    "detector": {
        "gfl": "gfl_tiny",
        "atss": "atss_tiny",
        "yolox_s": "yolox_nano",
        "yolof": "yolof_tiny",
    },
    "dataset": {"kitti": "roadscenes", "coco": "roadscenes"},
    "method": {"group_fisher_gradual": "group_fisher"},
}


@dataclass
class TableRow:
    """A row of the experiment's table.

    Attributes:
        keys: columns that identify the row.
        paper: the paper's number for each metric, None if not reported.
        job: overrides of the job, without the seed.
        config: flat settings shared by the job's runs.
        seeds: seeds of the experiment.
        runs: the first run of each seed, by seed.
    """

    keys: dict[str, Any]
    paper: dict[str, float | None]
    job: list[str]
    config: dict[str, Any]
    seeds: list[int]
    runs: dict[int, Run] = field(default_factory=dict)

    def values(self, metric: str, prefix: str = "") -> list[float]:
        """Return the metric of each run that measured it, in the paper's unit.

        Args:
            metric: a key of :data:`METRICS` or :data:`RUNTIMES`.
            prefix: ``base_`` for the unpruned detectors of the runs.
        """
        key, factor = (METRICS | RUNTIMES)[metric]
        rows = [numbers(run) for _, run in sorted(self.runs.items())]
        return [factor * row[prefix + key] for row in rows if prefix + key in row]

    @property
    def missing(self) -> list[int]:
        """Seeds of the experiment without a run."""
        return [seed for seed in self.seeds if seed not in self.runs]


def load_cells(name: str, size: str, given: Sequence[str] = ()) -> tuple[list[TableRow], str]:
    """Load the rows of an experiment, without runs, and its study.

    Args:
        name: a file of conf/experiment; its expected numbers are in experiments/<name>.
        size: ``full``, or ``small`` for the cells of the small variant.
        given: additional overrides that were passed to run.py.

    Raises:
        FileNotFoundError: there is no such experiment.
    """
    option = name if size == "full" else f"{name}_small"
    if not (ROOT / f"conf/experiment/{option}.yaml").is_file():
        known = ", ".join(sorted(file.stem for file in (ROOT / "conf/experiment").glob("*.yaml")))
        raise FileNotFoundError(f"no conf/experiment/{option}.yaml; there are {known}")
    study, found = compose_jobs(option, given)
    rows = read_rows(ROOT / "experiments" / name / "expected.csv") or _rows_of(found)
    cells = []
    for row in rows:
        keys = {k: v for k, v in row.items() if k not in METRICS}
        paper = {k: None if row[k] == "" else row[k] for k in row if k in METRICS}
        here = keys if size == "full" else _small(keys)
        own = [(job, config) for job, config in found if _tells(here, config)]
        if own:
            job = [override for override in own[0][0] if not override.startswith("seed=")]
            seeds = sorted({config["seed"] for _, config in own})
            cells.append(TableRow(keys, paper, job, identity.cell(own[0][1]), seeds))
    return cells, study


def compose_jobs(option: str, given: Sequence[str]) -> tuple[str, list[tuple[list[str], Any]]]:
    """Return the study of an experiment, and overrides and resolved configuration of its jobs.

    Args:
        option: a file of conf/experiment.
        given: additional overrides that were passed to run.py.
    """
    register()
    told = {_key(override) for override in given}
    composed: dict[tuple[str, ...], Any] = {}
    found = []
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        first = [f"experiment={option}"]
        whole = compose("config", [*first, *given], return_hydra_config=True)
        sweeper = whole.hydra.sweeper
        for job in jobs(sweeper.params or {}, sweeper.get("grids", ()), given):
            # compose once, which is slow, for all jobs that differ in plain values only
            chosen = tuple(o for o in job if _key(o) in told or (ROOT / "conf" / _key(o)).is_dir())
            if chosen not in composed:
                composed[chosen] = compose("config", [*first, *chosen])
            values = [override for override in job if override not in chosen]
            found.append((job, _plain(composed[chosen], values)))
    return whole.study, found


def _key(override: str) -> str:
    return override.partition("=")[0]


def _plain(config: Any, values: list[str]) -> dict[str, Any]:
    """Resolve the configuration with an empty run name, which only a run has."""
    merged = OmegaConf.merge(config, OmegaConf.from_dotlist(values), {"run_name": ""})
    plain: Any = OmegaConf.to_container(merged, resolve=True)
    return plain


def _rows_of(found: Sequence[tuple[list[str], Any]]) -> list[dict[str, Any]]:
    """Rows of an experiment that is not in the paper: the keys swept by its jobs."""
    rows: list[dict[str, Any]] = []
    for job, config in found:
        keys = [key for key in map(_key, job) if key != "seed"]
        row = {key: _select(config, key) for key in keys} | {"AP": "", "mAP": ""}
        if row not in rows:
            rows.append(row)
    return rows


def _small(keys: dict[str, Any]) -> dict[str, Any]:
    return {key: SMALL.get(key, {}).get(value, value) for key, value in keys.items()}


def _select(config: dict[str, Any], key: str) -> Any:
    """Return the value of a dotted key, or the name of a group."""
    value: Any = config
    for part in key.split("."):
        value = value[part] if value else None
    return value.get("name") if isinstance(value, dict) else value


def _tells(keys: dict[str, Any], config: dict[str, Any]) -> bool:
    words = {"true": True, "false": False}
    return all(_select(config, k) == words.get(v, v) for k, v in keys.items() if v != "")


def load_runs(studies: Sequence[Path]) -> Iterator[Run]:
    """Open the finished runs of studies; raise FileNotFoundError for a missing study."""
    for study in studies:
        yield from (run for run in readable(open_runs(study)) if run.finished and run.config)


def numbers(run: Run) -> dict[str, Any]:
    """Return the measurements of a run, with latencies by device type."""
    return run.row | _latencies(run)


def _latencies(run: Run) -> dict[str, float]:
    """Latency by device type; later measurements take precedence over the run's own."""
    gpus = {gpu for start in run.starts for gpu in start["environment"].get("gpus", "").split(", ")}
    found = {}
    for prefix in ("base_", ""):
        if f"{prefix}latency_ms" in run.row:
            kind = "gpu_ms" if run.row.get(f"{prefix}device") in gpus else "cpu_ms"
            found[prefix + kind] = run.row[f"{prefix}latency_ms"]
    return found | run.latencies


def fill(cells: Sequence[TableRow], runs: Sequence[Run]) -> None:
    """Assign the runs to the rows."""
    for run in runs:
        for cell in cells:
            if not differing(cell, run.settings):
                cell.runs.setdefault(run.row["seed"], run)


def differing(cell: TableRow, config: dict[str, Any]) -> list[str]:
    """Keys in which the flat settings of a run differ from those of the row."""
    return [key for key, _, _ in differences(config, cell.config)]
