"""The paper's figures by name, drawn from run directories.

A run is given by its directory (last round) or by one of its round-<t>.ckpt files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from ldt.build import build_criterion, data_of, module_of
from ldt.criteria.ldt import LDTCriterion
from ldt.detectors.checkpoints import read
from ldt.evaluation.metrics import MAX_DETECTIONS
from ldt.evaluation.score_stability import batch_utilities
from ldt.figures import from_runs
from ldt.figures.attention import draw_attention
from ldt.figures.channels import draw_channels
from ldt.figures.comparison import draw_comparisons
from ldt.figures.curve_data import panels
from ldt.figures.detections import draw_detections
from ldt.figures.discriminants import draw_discriminants
from ldt.figures.shrinking import animate_shrinking, draw_shrinking
from ldt.figures.stability import draw_stability
from ldt.figures.style import save
from ldt.figures.training import draw_training
from ldt.runs.files import check_target, picture_folder
from ldt.runs.files import detections as detections_file
from ldt.runs.refusal import refusing
from ldt.runs.run import Run, load_config, open_run


@dataclass(frozen=True)
class Options:
    """Options of a figure.

    Attributes:
        out: output file; None: ``pictures/<name>.png`` of the run or study.
        images: number of images shown or analysed.
        scale: scale of the neck for ``discriminants``; None: the strongest.
        trust: run the code that the runs' checkpoints and configurations name.
    """

    out: Path | None = None
    images: int | None = None
    scale: int | None = None
    trust: bool = False


def discriminants(runs: Sequence[Run], given: Options) -> Figure:
    """Fig. 1: classes, eigenvalues and channels of one or two runs' bases."""
    bases = [run if run.named else run.at(0) for run in runs]
    data = data_of(runs[0], given.trust)
    found = [from_runs.spaces(run.checkpoint(), data, given.images) for run in bases]
    scales = min(len(spaces) for spaces in found)
    with refusing():
        if given.scale is not None and not 0 <= given.scale < scales:
            raise ValueError(f"--scale {given.scale}; the neck has the scales 0 to {scales - 1}")
    power = [sum(spaces[scale].power for spaces in found) for scale in range(scales)]
    scale = power.index(max(power)) if given.scale is None else given.scale
    shown = [spaces[scale] for spaces in found]
    return draw_discriminants(shown, _names(bases), from_runs.class_names(data))


def attention(runs: Sequence[Run], given: Options) -> Figure:
    """Fig. 4: Grad-CAM on the same images; for a single run, base and last round."""
    runs = _ends(runs)
    data, files = data_of(runs[0], given.trust), [run.checkpoint() for run in runs]
    views = from_runs.views(files, data, given.images or 3)
    return draw_attention(views, _titles(runs))


def detections(runs: Sequence[Run], given: Options) -> Figure:
    """Fig. 5: detections on the same images; for a single run, base and last round."""
    runs = _ends(runs)
    data, files = data_of(runs[0], given.trust), [run.checkpoint() for run in runs]
    scenes = from_runs.scenes(files, data, given.images or 4)
    return draw_detections(scenes, data.classes, _titles(runs))


def stability(runs: Sequence[Run], given: Options) -> Figure:
    """Fig. 6: utilities of the base's channels per batch of calibration images."""
    (run,) = runs
    run = run if run.named else run.at(0)
    config = load_config(run.folder, given.trust)
    criterion, prune = build_criterion(config), config.prune
    if not isinstance(criterion, LDTCriterion):
        criterion = LDTCriterion()
    images = given.images or prune.images
    loader = data_of(run, given.trust).calibration_dataloader(images, prune.batch_size)
    return draw_stability(
        batch_utilities(module_of(run, given.trust).adapter, criterion, loader, list(prune.scope))
    )


def channels(runs: Sequence[Run], given: Options) -> Figure:
    """Channels kept in each layer."""
    (run,) = runs
    return draw_channels(
        from_runs.channels(run.checkpoint(0)), from_runs.channels(run.checkpoint())
    )


def shrinking(runs: Sequence[Run], given: Options) -> Figure:
    """Draw the width of each layer over the rounds."""
    return draw_shrinking(*_rounds(runs[0]))


def results(runs: Sequence[Run], given: Options) -> Figure:
    """Losses and metrics over the epochs."""
    return draw_training(runs[0].log, from_runs.METRICS)


def _accuracy(name: str, runs: Sequence[Run], given: Options) -> Figure:
    """Draw a figure of the kept detections; for a single run, of base and last round."""
    ends = _ends(runs)
    names = [from_runs.end_title(run.measured) for run in ends]
    if len({run.folder for run in ends}) > 1:
        names = [title.split("\n")[0] for title in _titles(ends)]
        names = names if len(set(names)) == len(ends) else [str(run.folder) for run in ends]
    files = [run.folder / detections_file(run.measured["round"]) for run in ends]
    most = ends[0].config["dataset"].get("max_detections", MAX_DETECTIONS)
    drawn = from_runs.accuracy_figures(dict(zip(names, files, strict=True)), [name], most)
    if not drawn:
        raise ValueError("no validation image has an object: there is no accuracy to draw")
    return drawn[name]


DRAWN: dict[str, Callable[[Sequence[Run], Options], Figure]] = {
    function.__name__: function
    for function in (discriminants, attention, detections, stability, channels, shrinking, results)
} | {name: partial(_accuracy, name) for name in from_runs.ACCURACY}
ALONE = ("stability", "channels", "shrinking", "results")  # figures of exactly one run


def _rounds(run: Run) -> tuple[list[dict[str, int]], list[str]]:
    """Channels per layer and titles of a run's rounds."""
    rounds = [run.at(row["round"]) for row in run.rows]
    names = [from_runs.side_title(each.measured, run.metric) for each in rounds]
    return [from_runs.channels(each.checkpoint()) for each in rounds], names


def _opened(name: str, paths: Sequence[Path], trust: bool) -> list[Run]:
    """Open the runs of a figure and check their number."""
    if name in ALONE and len(paths) != 1:
        raise ValueError(f"{len(paths)} runs given; {name} shows one: give a single RUN")
    if name == "discriminants" and len(paths) > 2:
        raise ValueError(f"{len(paths)} runs given; discriminants shows one or two")
    runs = [open_run(path) for path in paths]
    for run in runs:
        file = run.checkpoint()  # raises before anything is drawn
        if trust:
            read(file, trust)  # imports their code, so that further checkpoints need no trust
    return runs


def _ends(runs: Sequence[Run]) -> Sequence[Run]:
    alone = len(runs) == 1 and not runs[0].named and runs[0].measured["round"] > 0
    return [runs[0].at(0), runs[0]] if alone else runs


def _names(runs: Sequence[Run]) -> list[str]:
    """``without LDT`` and ``with LDT`` if that distinguishes the runs, else their folder names."""
    kinds = ["with LDT" if run.config["ldt"]["enabled"] else "without LDT" for run in runs]
    return kinds if len(set(kinds)) == len(runs) else [run.folder.name for run in runs]


def _titles(runs: Sequence[Run]) -> list[str]:
    """Format method (or base), metric and size of each run."""
    names = ["base" if run.round == 0 else run.config["method"]["name"] for run in runs]
    names = [
        f"{name}, LDT" if run.config["ldt"]["enabled"] and name != "ldt" else name
        for name, run in zip(names, runs, strict=True)
    ]
    return [
        from_runs.title(run.measured, run.metric, name)
        for name, run in zip(names, runs, strict=True)
    ]


def draw(name: str, paths: Sequence[Path], given: Options) -> list[Path]:
    """Draw one figure.

    Args:
        name: one of :data:`ldt.figures.NAMES`.
        paths: runs, or studies for ``curves``.
        given: options of the figure.

    Returns:
        The written files.

    Raises:
        FileNotFoundError: a run or checkpoint does not exist.
        ValueError: too many or too few runs, or nothing to draw.
        ImportError: the figure needs a package that is not installed; the message names the extra.
    """
    if name == "curves":
        with refusing():
            found = panels(paths)
            file = given.out or picture_folder(paths[0]) / "curves.png"
            check_target(file)
        save(draw_comparisons(found), file)
        return [file]
    with refusing():
        runs = _opened(name, paths, given.trust)
        folder = runs[0].folder if len(runs) == 1 else runs[0].folder.parent
        files = [given.out or picture_folder(folder) / f"{name}.png"]
        if name == "shrinking" and not given.out:
            files.append(files[0].with_suffix(".gif"))
        for file in files:
            check_target(file)
    for file in files:
        if name == "shrinking" and file.suffix == ".gif":
            animate_shrinking(*_rounds(runs[0]), file)
        else:
            save(DRAWN[name](runs, given), file)
    return files
