"""Summaries of made-up runs."""

from omegaconf import OmegaConf

from ldt.runs.files import write_json, write_rows


def row(round_, **changed):
    known = {
        "round": round_,
        "AP": 0.4 - 0.01 * round_,
        "AP50": 0.7,
        "mAP": 0.69,
        "params": 630_000 // (1 + round_),
        "multiply_adds": 410_000_000,
        "rate": 0.5 if round_ else 0.0,
        "latency_ms": 12.34,
        "threads": 2,
        "device": "cpu",
    }
    return known | changed


def summary(*rows, **changed):
    rows = list(rows or (row(0), row(1)))
    known = {
        "status": "finished",
        "run": "roadscenes-gfl_tiny-ldt-params0.5-s0",
        "study": "default",
        "detector": "gfl_tiny",
        "dataset": "roadscenes",
        "method": "ldt",
        "metric": "AP",
        "seed": 0,
        "input_size": [128, 256],
        "plan": {"rate": 0.5, "rounds": len(rows) - 1, "budget": "params"},
        "rounds": rows,
        "checkpoint": f"round-{len(rows) - 1}.ckpt",
    }
    return known | changed


def finished(study, name, **changed):
    (study / name).mkdir()
    write_json(study / name / "summary.json", summary(run=name, **changed))


def configured(study, name, config, log=(), **changed):
    """A finished run with its configuration and its training log."""
    finished(study, name, **changed)
    folder = study / name
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    if log:
        (folder / "logs").mkdir()
        write_rows(folder / "logs" / "metrics.csv", list(log))
    return folder
