"""The commands of `ldt`; imports are deferred to each command to keep `--help` fast."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ldt.figures import NAMES
from ldt.runs import STATES
from ldt.runs.formatting import printable
from ldt.runs.refusal import refused, refusing, renaming

if TYPE_CHECKING:
    from ldt.runs.run import Run

PATH = click.Path(path_type=Path)
KINDS = {  # of files, by argument
    "checkpoint": "checkpoint",
    "images": "image or folder",
    "data": "folder in COCO's or KITTI's layout",
}
PATTERN = set("*?[")  # a name with one of these may stand for several files
FORMATS = ("html", "markdown", "latex", "csv")
MEASURES = ("loss", "AP")
FRAMES = ("video", "pictures")
EXPORTS = ("mmdet", "onnx", "openvino")
TRUST = click.option(
    "--trust",
    is_flag=True,
    help="Import the code that the author of these files has written. It can do anything.",
)
RUNTIMES = ("eager", "onnxruntime", "openvino")
LISTED = 5  # maximum number of runs listed in a message


class ShareType(click.ParamType):
    """A share such as 0.3; who types 30 or 30% is told so."""

    name = "float"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number that was typed."""
        from ldt.config.values import Share, check_value

        given = value
        with suppress(ValueError):
            given = float(value)
        with refusing():
            check_value(param.opts[0] if param else self.name, given, Share, 0.3)
        return given


SHARE = ShareType()


def existing(_: click.Context, parameter: click.Parameter, given: Any) -> Any:
    """Check files and folders before anything is imported; patterns and packaged configs pass."""
    for path in given if isinstance(given, tuple) else (given,):
        if path is not None and not _is_there(str(path)):
            kind = KINDS.get(str(parameter.name), "file or folder")
            raise refused(FileNotFoundError(f"no {kind} at {str(path)!r}"))
    return given


def _is_there(path: str) -> bool:
    return "::" in path or bool(PATTERN & set(path)) or Path(path).exists()


def known_criterion(_: click.Context, __: click.Parameter, given: Any) -> Any:
    """Check the names of criteria before anything is imported."""
    from ldt.config import untrained_methods
    from ldt.config.names import choices

    known = sorted(untrained_methods())
    for name in given if isinstance(given, tuple) else (given,):
        if name not in known:
            raise refused(ValueError(f"--criterion {name}: {choices(name, known)}"))
    return given


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="ldt")
@click.pass_context
def ldt(context: click.Context) -> None:
    """Compress visual detectors by location-aware discriminant analysis.

    \b
    Examples:
      ldt run                                   train, prune and retrain on the built-in data set
      ldt data dataset=coco dataset.root=/data  show what a data set holds and what is left out
      ldt report runs/default                   compare the runs of a study on one HTML page
      ldt prune CONFIG WEIGHTS DATA --rate 0.3  show what is pruned and the cost in AP
      ldt export runs/default/<run>/round-2.ckpt exported     write a pruned detector for mmdet

    ldt <command> --help shows the options of a command and examples.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@ldt.command(
    add_help_option=False,  # Hydra has its own
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def run(overrides: tuple[str, ...]) -> None:
    """Train, prune and retrain a detector: `python run.py`, with Hydra's overrides and flags."""
    from ldt.cli.hydra_app import main

    main(overrides)


@ldt.command()
@click.argument("overrides", nargs=-1, metavar="[OVERRIDE...]")
def data(overrides: tuple[str, ...]) -> None:
    """Show what a data set holds, and what of it is left out and why; nothing is trained.

    OVERRIDEs are those of `ldt run`: the same keys read the same data.

    \b
    Examples:
      ldt data dataset=coco dataset.root=/data/coco
      ldt data dataset=kitti dataset.root=/data/mine dataset.classes=[car,bus]
    """
    from ldt.cli import data_table

    data_table.run(overrides)


@ldt.command()
@click.argument("study", type=PATH)
@click.option("--format", "form", type=click.Choice(FORMATS), default="html", show_default=True)
@click.option("--out", type=PATH, help="File [default: STUDY/report.html; tables are printed].")
@click.option(
    "--pictures",
    type=click.FloatRange(0),
    default=20.0,
    show_default=True,
    metavar="MB",
    help="Limit on the size of embedded pictures; 0: none.",
)
def report(study: Path, form: str, out: Path | None, pictures: float) -> None:
    """Compare the runs of STUDY, a folder runs/<study>, on one HTML page or as a table.

    \b
    Examples:
      ldt report runs/compare
      ldt report runs/compare --format latex --out table.tex
    """
    from ldt.report.page import page
    from ldt.report.tables import write
    from ldt.runs.aggregate import cells
    from ldt.runs.files import check_target, write_text
    from ldt.runs.run import readable

    if form == "html":
        out = out or study / "report.html"
    if out is not None:
        with refusing():
            check_target(out)
    with refusing(OSError):
        runs = _finished_study(study)
    readable(runs)  # names the damaged ones, which the page shows too
    if form == "html":
        text = page(study.resolve(), runs, pictures, place=out and out.parent)
    else:
        text = write(cells(runs), form)
    if out is None:
        click.echo(text, nl=False)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    click.echo(out)


def _finished_study(study: Path) -> "list[Run]":
    """Open the study's runs.

    Raises:
        FileNotFoundError: there is no such study, or no finished run in it.
        DamagedError: all of its runs are damaged.
    """
    from ldt.runs.files import DamagedError, holds_run
    from ldt.runs.run import open_runs

    _check_is_no_run(study)
    if not study.is_dir():
        there = sorted(
            folder.name
            for folder in study.parent.glob("*/")
            if any(holds_run(run) for run in folder.glob("*/"))
        )
        raise FileNotFoundError(
            f"no study at {study}; studies in {study.parent}: {', '.join(there) or 'none'}"
        )
    runs = open_runs(study)
    if not any(run.finished for run in runs):
        told = [f"; {run.name}: {run.row.get('error', run.row['status'])}" for run in runs]
        listed = f"{''.join(told[:LISTED])}{'; ...' if told[LISTED:] else ''}"
        if runs and all(run.damaged for run in runs):
            raise DamagedError(f"all runs of {study} are damaged ({len(runs)}){listed}")
        raise FileNotFoundError(
            f"no finished run in {study}, which has {len(runs)} runs; `ldt run` with the same "
            f"keys resumes a run{listed}"
        )
    return runs


def _check_is_no_run(study: Path) -> None:
    """Raise FileNotFoundError if a run is given in place of its study."""
    from ldt.runs.files import holds_run

    if holds_run(study):
        raise FileNotFoundError(f"{study} is a run; give its study: {study.parent}")


@ldt.command("runs")
@click.argument("study", type=PATH)
@click.option(
    "--state", "states", type=click.Choice(STATES), multiple=True, help="Only these; repeat it."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list with the errors too.")
def list_runs(study: Path, states: tuple[str, ...], as_json: bool) -> None:
    """List the runs of STUDY, a folder runs/<study>, without reading more than their summaries.

    \b
    Examples:
      ldt runs runs/compare
      ldt runs runs/compare --state failed --state damaged --json
    """
    from ldt.report import listing

    with refusing():
        _check_is_no_run(study)
        found = listing.list_runs(study, states)
    click.echo(listing.as_json(found) if as_json else listing.as_table(found))


@ldt.command()
@click.argument("name", type=click.Choice(NAMES), metavar="NAME")
@click.argument("runs", type=PATH, nargs=-1, required=True, metavar="RUN...")
@click.option("--out", type=PATH, help="File [default: pictures/NAME.png of the run or study].")
@click.option("--images", type=click.IntRange(1), help="Number of images shown or analysed.")
@click.option(
    "--scale", type=int, help="discriminants: scale of the neck [default: the strongest]."
)
@TRUST
def figures(
    name: str,
    runs: tuple[Path, ...],
    out: Path | None,
    images: int | None,
    scale: int | None,
    trust: bool,
) -> None:
    """Draw the figure NAME of runs.

    \b
    Names:
      curves          metric against parameters, of studies runs/<study> (Fig. 3)
      discriminants   classes, eigenvalues and channels of one or two bases (Fig. 1)
      attention       Grad-CAM on the same images (Fig. 4)
      detections      detections on the same images (Fig. 5)
      stability       channel utilities per batch (Fig. 6)
      channels        channels kept in each layer
      shrinking       width of each layer over the rounds, PNG and GIF
      results         losses and metrics over the epochs
      precision_recall  precision against recall of each class
      class_ap        AP of each class
      confusion       which class is detected as which, and what is missed

    A RUN is a run directory (its last round) or one of its round-<t>.ckpt files.

    \b
    Examples:
      ldt figures detections runs/compare/<run> runs/compare/<another> --images 4
      ldt figures attention runs/compare/<run>/round-0.ckpt runs/compare/<run>
      ldt figures curves runs/compare
    """
    from ldt.figures.style import check_format

    if out:
        with refusing():
            check_format(out, ["gif"] if name == "shrinking" else [])

    from ldt.detectors.models import quiet
    from ldt.figures.paper import Options, draw

    quiet()
    with refusing(FileNotFoundError, ImportError):
        files = draw(name, runs, Options(out, images, scale, trust))
    for file in files:
        click.echo(file)


GIVEN = click.argument(
    "given",
    nargs=-1,
    required=True,
    callback=existing,
    metavar="(CHECKPOINT | CONFIG WEIGHTS) DATA",
)


def own_files(command: Callable) -> Callable:
    """Add the options for data in COCO's format whose files have names of their own."""
    for name, text in reversed(
        (
            ("--train-ann", "Annotation file in COCO's format, below DATA."),
            ("--train-img", "Its image folder."),
            ("--val-ann", "The same for validation."),
            ("--val-img", "Its image folder."),
        )
    ):
        command = click.option(name, help=text)(command)
    return command


@ldt.command()
@GIVEN
@click.option("--rate", type=SHARE, help="Share of the budget to remove: 0.3.")
@click.option(
    "--criterion",
    default="ldt",
    show_default=True,
    callback=known_criterion,
    help="A method of conf/method.",
)
@click.option(
    "--budget",
    default="params",
    show_default=True,
    help="Unit of the rate: params, macs or latency.",
)
@click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    help="Of the latency [default: onnxruntime].",
)
@click.option("--threads", type=click.IntRange(1), help="Of the latency [default: 1].")
@click.option("--target-ms", type=float, help="Latency to reach, instead of --rate.")
@click.option(
    "--ranking",
    help="How scores of different layers are compared [default: the method's own].",
)
@click.option(
    "--repair",
    default="bn",
    show_default=True,
    help="After the removal: none, bn (batch norms) or lstsq (weights too).",
)
@click.option(
    "--images", type=click.IntRange(1), default=32, show_default=True, help="Calibration images."
)
@click.option(
    "--val", type=click.IntRange(0), default=100, show_default=True, help="Images to measure AP on."
)
@click.option("--out", type=PATH, help="Checkpoint to write, for `ldt export` and `ldt predict`.")
@own_files
@TRUST
def prune(
    given: tuple[str, ...],
    rate: float | None,
    criterion: str,
    budget: str,
    runtime: str | None,
    threads: int | None,
    target_ms: float | None,
    ranking: str | None,
    repair: str,
    images: int,
    val: int,
    out: Path | None,
    trust: bool,
    **files: str | None,
) -> None:
    """Show what pruning would remove and what it costs in AP, without training.

    CONFIG is an mmdet config (a file, or mmdet::<family>/<file> for a packaged one), WEIGHTS its
    weights, DATA a folder in COCO's or KITTI's layout. CHECKPOINT is a detector that ldt has
    trained or pruned, or a run's directory (its last round); DATA are then by default its run's.

    \b
    Examples:
      ldt prune mmdet::yolox/yolox_nano_8xb8-300e_coco.py yolox_nano.pth /data/coco --rate 0.3
      ldt prune pruned.ckpt /data/coco --rate 0.3 --out smaller.ckpt
    """
    from ldt.cli import pruning
    from ldt.detectors.models import quiet

    quiet()
    with renaming(pruning.OPTIONS):
        pruning.run(
            given,
            images=images,
            val=val,
            out=out,
            files={name: file for name, file in files.items() if file is not None},
            rate=rate,
            criterion=criterion,
            budget=budget,
            latency={"runtime": runtime, "threads": threads, "target_ms": target_ms},
            ranking=ranking,
            repair=repair,
            trust=trust,
        )


@ldt.command()
@GIVEN
@click.option(
    "--criterion",
    "criteria",
    multiple=True,
    callback=known_criterion,
    default=("ldt",),
    show_default=True,
    help="A method of conf/method; repeat it to compare.",
)
@click.option(
    "--rate",
    "rates",
    type=SHARE,
    multiple=True,
    help="Share of a group's channels; repeat it [default: 0.1 to 0.9].",
)
@click.option("--measure", type=click.Choice(MEASURES), default=MEASURES[0], show_default=True)
@click.option(
    "--images", type=click.IntRange(1), default=32, show_default=True, help="Calibration images."
)
@click.option(
    "--val", type=click.IntRange(1), default=8, show_default=True, help="Images to measure on."
)
@click.option(
    "--out", type=PATH, default=Path("."), help="Folder [default: the working directory]."
)
@own_files
@TRUST
def sensitivity(given: tuple[str, ...], out: Path, trust: bool, **options: Any) -> None:
    """Show what removing channels of each group of layers alone does, without training.

    Of one group after the other 10 to 90 % of the channels are left out, those of the lowest
    scores, and the detection loss (or AP) is measured without them. Writes sensitivity.csv and
    sensitivity.png. The arguments are those of `ldt prune`.

    \b
    Examples:
      ldt sensitivity my_config.py my_weights.pth /data/mine
      ldt sensitivity runs/default/<run> --criterion ldt --criterion l1 --criterion random
      ldt sensitivity pruned.ckpt /data/coco --measure AP --val 50 --rate 0.3 --rate 0.6
    """
    from ldt.cli import pruning, sensitivities
    from ldt.detectors.models import quiet

    quiet()
    names = ("train_ann", "train_img", "val_ann", "val_img")
    files = {name: file for name in names if (file := options.pop(name)) is not None}
    with renaming(pruning.OPTIONS):
        sensitivities.run(given, out, files=files, trust=trust, **options)


@ldt.command()
@click.argument("checkpoint", type=PATH, callback=existing)
@click.argument("out", type=PATH)
@click.option("--format", "form", type=click.Choice(EXPORTS), default=EXPORTS[0], show_default=True)
@click.option("--int8", is_flag=True, help="Weights and feature maps of 8 bits.")
@click.option(
    "--images",
    type=PATH,
    callback=existing,
    help="Folder of images to check the file, and calibrate int8.",
)
@click.option(
    "--data",
    type=PATH,
    callback=existing,
    help="Data in COCO's or KITTI's layout [default: the run's].",
)
@click.option("--raw", is_flag=True, help="Output the head's maps, not boxes.")
@click.option("--size", metavar="HxW", help="Of the input [default: that of the training].")
@click.option(
    "--max-detections",
    type=click.IntRange(1, 100_000),
    metavar="K",
    help="Of an image [default: the detector's limit, or 300].",
)
@click.option("--force", is_flag=True, help="Write int8 whatever AP it loses.")
@TRUST
def export(checkpoint: Path, out: Path, form: str, **options: Any) -> None:
    """Write the pruned detector of CHECKPOINT for mmdet, ONNX Runtime or OpenVINO.

    CHECKPOINT is a file, or a run's directory (its last round). For mmdet, OUT is a folder, for
    config.py and weights.pth. For the others it is a file, .onnx or .xml, that takes an image of
    fixed size and gives boxes, scores and labels. It is written only if it detects what the
    detector detects.

    \b
    Examples:
      ldt export runs/default/<run> exported
      ldt export runs/default/<run>/round-2.ckpt detector.onnx --format onnx
      ldt export runs/default/<run>/round-2.ckpt detector.xml --format openvino --int8
    """
    from ldt.cli import exporting
    from ldt.detectors.models import quiet

    quiet()
    with renaming({"dataset.root=": "--data "}):
        exporting.run(checkpoint, out, form, **options)


@ldt.command()
@click.argument("checkpoint", type=PATH, callback=existing, metavar="CHECKPOINT")
@click.argument("images", type=PATH, callback=existing, nargs=-1, required=True, metavar="IMAGE...")
@click.option("--out", type=PATH, default=Path("predictions"), show_default=True, help="Folder.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    default=0.3,
    show_default=True,
    help="Minimum score of drawn boxes; predictions.json has all.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=64_000_000,
    show_default=True,
    help="Larger images are not decoded.",
)
@click.option(
    "--every",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Of a video take every N-th frame.",
)
@click.option(
    "--frames",
    type=click.Choice(FRAMES),
    default=FRAMES[0],
    show_default=True,
    help="What the frames of a video are drawn into.",
)
@TRUST
def predict(
    checkpoint: Path,
    images: tuple[Path, ...],
    out: Path,
    threshold: float,
    max_pixels: int,
    every: int,
    frames: object,
    trust: bool,
) -> None:
    """Detect objects in images, videos, or folders of them, with the detector of CHECKPOINT.

    CHECKPOINT may also be a run's directory (its last round), or an exported file, .onnx or .xml.
    Images that cannot be read are named at the end, after the results of the others are written.

    \b
    Examples:
      ldt predict runs/default/<run> photos --out predictions --threshold 0.5
      ldt predict runs/default/<run> 'photos/*.jpg' drive.mp4 --every 10
      ldt predict detector.onnx photos
    """
    from torch.cuda import is_available

    from ldt.deployment import prediction
    from ldt.detectors.models import quiet
    from ldt.progress.console import print_lines

    quiet()
    device = "cuda" if is_available() else "cpu"
    options = {"device": device, "max_pixels": max_pixels, "trust": trust}
    options |= {"every": every, "frames": frames}
    with renaming({"dataset.max_pixels=": "--max-pixels "}):
        prediction.predict(
            checkpoint,
            images,
            out,
            threshold,
            tell=lambda line: print_lines(line.replace("threshold=", "--threshold ")),
            **options,
        )
    print_lines(f"written: {out / 'predictions.json'}, {out / 'pictures'}")


@ldt.command()
@click.argument("files", type=PATH, callback=existing, nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--runtime",
    "runtimes",
    type=click.Choice(RUNTIMES),
    multiple=True,
    help="Of checkpoints; repeat it [default: all].",
)
@click.option(
    "--threads", type=click.IntRange(1), multiple=True, default=(1,), help="Repeat it [default: 1]."
)
@click.option(
    "--runs", type=click.IntRange(3), default=30, show_default=True, help="Timed calls of each."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON with the deciles too.")
@TRUST
def benchmark(
    files: tuple[Path, ...],
    runtimes: tuple[str, ...],
    threads: tuple[int, ...],
    runs: int,
    as_json: bool,
    trust: bool,
) -> None:
    """Time detectors side by side, one call of each after the other.

    A FILE is a checkpoint or a run's directory (its last round), of which the raw maps are timed in
    every runtime, or an exported file (.onnx, .xml). Times are medians; with one thread CPU time
    counts, which other programs on the machine hardly change.

    \b
    Examples:
      ldt benchmark runs/default/<run>/round-0.ckpt runs/default/<run>/round-2.ckpt
      ldt benchmark round-2.ckpt detector.onnx detector.xml --threads 1 --threads 4 --json
    """
    from ldt.cli import benchmarking
    from ldt.detectors.models import quiet

    quiet()
    benchmarking.run(files, runtimes or RUNTIMES, threads, runs, as_json, trust)  # type: ignore[arg-type]


@ldt.command()
@click.argument("earlier", type=PATH, metavar="RUN")
@click.argument("folder", type=PATH)
@TRUST
def repeat(earlier: Path, folder: Path, trust: bool) -> None:
    """Repeat the run RUN with the same configuration in a new FOLDER.

    \b
    Example:
      ldt repeat runs/default/<run> runs/again/<run>
    """
    from ldt.cli import repetition

    repetition.repeat(earlier, folder, trust)


@ldt.command()
@click.argument("study", type=PATH)
@click.option("--failed", is_flag=True, required=True, help="The runs that failed.")
@click.option("--yes", is_flag=True, help="Remove without asking.")
def forget(study: Path, failed: bool, yes: bool) -> None:
    """Remove the failed runs of STUDY, a folder runs/<study>, after showing them.

    Finished, unfinished and running ones stay, and so do those whose summary is damaged.

    \b
    Example:
      ldt forget runs/compare --failed
    """
    from ldt.runs import study as studies

    with refusing():
        _check_is_no_run(study)
        found = studies.failed_runs(study)
    for folder, reason in found.items():
        click.echo(printable(f"{folder.name}  {reason}"))
    if found and not yes and not click.confirm(f"remove {len(found)} failed runs of {study}?"):
        found = {}
    found = {folder: reason for folder, reason in found.items() if studies.remove(folder)}
    click.echo(f"removed: {len(found)} runs")


@ldt.command()
@click.argument("study")
@click.option("--project", default="ldt", show_default=True, help="As logger.project of the runs.")
@click.option("--entity", help="User or team [default: the account's own].")
def dashboard(study: str, project: str, entity: str | None) -> None:
    """Save a Weights & Biases workspace and report that compare the runs of STUDY.

    STUDY is the runs' group on W&B: study=<name> of `ldt run`.

    \b
    Example:
      ldt dashboard compare --project ldt
    """
    from ldt.report import workspaces

    for name, address in workspaces.save(study, project, entity).items():
        click.echo(f"{name}: {address}")


@ldt.command()
@click.argument("runs", type=PATH, nargs=-1, required=True, metavar="RUN...")
@TRUST
def layers(runs: tuple[Path, ...], trust: bool) -> None:
    """Write layers.csv and structure.json (the layers of every round) for runs without them.

    \b
    Example:
      ldt layers runs/default/<run>
    """
    from ldt.detectors.models import quiet
    from ldt.evaluation.layers import write_inventory
    from ldt.runs.files import LAYERS, STRUCTURE, check_target

    quiet()
    for folder in runs:
        with refusing():
            check_target(folder / STRUCTURE)
            write_inventory(folder, trust)
        click.echo(folder / LAYERS)
