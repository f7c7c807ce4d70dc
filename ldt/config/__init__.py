"""Typed schema of all configuration keys: their meaning, allowed values and defaults.

The comment of a key (at its end, or on the lines above it) is its description in `ldt run --help`
and docs/keys.md; a type of :mod:`ldt.config.kinds` says and checks what it allows. A type that
OmegaConf does not know is the second argument of ``Annotated``.

Hydra merges the files of ``conf/`` into these dataclasses, so that a misspelt key or a value of
the wrong type raises before any model is built, naming the key. Unknown keys added with ``+`` are
rejected by :func:`ldt.config.keys.check_keys`.
"""

import re
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from omegaconf import MISSING, OmegaConf

from ldt.config import kinds
from ldt.config.kinds import Count, NaturalNumber, NotNegative, Positive, Ratio, Share


@dataclass
class DetectorConfig:
    """An mmdet detector: base config, changes to it, and the module that LDT uses."""

    name: str = MISSING  # in the names of runs and in tables
    config: str = MISSING  # a config file, or mmdet::<family>/<file> for a packaged one
    options: dict[str, Any] = field(default_factory=dict)  # merged into the config's `model`
    checkpoint: str | None = None  # weights of the whole detector, mmdet's or ours
    pretrained: bool = False  # load the pretrained backbone that the config names
    neck: str = "auto"  # module whose output LDT acts on
    predictors: list[str] | None = None  # modules never pruned; null: detected automatically
    size: str = "full"  # full, tiny or square: picks the input size in dataset.scales
    pad: Annotated[str, kinds.Pad] = "none"  # square: pad every image to the input size (YOLOX)
    # of augment=mosaic: range of the random scale
    mosaic_scale: list[float] = field(default_factory=lambda: [0.1, 2.0])
    mixup: bool = True  # of augment=mosaic: mosaics are mixed with images


@dataclass
class RecipeConfig:
    """How a detector is trained: epochs, optimizer (mmengine's keys), schedule, augmentation."""

    epochs: NaturalNumber = MISSING  # base training; 0 starts from detector.checkpoint
    retrain_epochs: NaturalNumber = MISSING  # after each pruning step
    batch_size: Count = MISSING  # images per optimizer step, over all processes
    # batch size that the learning rate is given for; null: it does not follow the batch size
    base_batch_size: Count | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)  # mmengine's keys, `type` first
    paramwise: dict[str, Any] = field(default_factory=dict)  # mmengine's paramwise_cfg
    schedule: Annotated[str, Literal["step", "cosine", "constant"]] = "step"  # of the learning rate
    milestones: list[Ratio] = field(default_factory=lambda: [2 / 3, 11 / 12])  # shares of a phase
    gamma: Ratio = 0.1  # factor at each milestone
    warmup: NaturalNumber = 500  # steps, at most a fifth of a phase
    warmup_epochs: NotNegative = 0.0  # above 0: instead of `warmup`
    # how the learning rate rises; constant stays at warmup_start
    warmup_shape: Annotated[str, Literal["linear", "quadratic", "constant"]] = "linear"
    warmup_start: Ratio | None = None  # share of the learning rate at first; null: 1 / steps
    min_lr: Ratio = 0.0  # final share of the learning rate of the cosine schedule
    # begin, end and half period of the cosine, as shares of a phase; []: from warm-up to the end
    cosine: Annotated[list[float], kinds.Cosine] = field(default_factory=list)
    retrain_lr: Positive = 1.0  # share of the learning rate used while retraining
    clip_grad: Positive | None = None  # maximum gradient norm
    channels_last: bool = False  # images and feature maps in NHWC order: a fifth faster on CPUs
    ema: Share | None = None  # momentum of mmdet's ExpMomentumEMA; null: no moving average
    augment: Annotated[str, kinds.Augment] = "flip"  # config: what `pipeline` says
    plain_epochs: NaturalNumber = 0  # last epochs of a phase without mosaic
    plain_l1: bool = True  # with YOLOX's L1 loss in these epochs
    pipeline: list[Any] = field(default_factory=list)  # of augment=config: mmdet's transforms
    plain_pipeline: list[Any] = field(default_factory=list)  # that of the plain epochs


@dataclass
class LDTConfig:
    """LDT's two losses (eqs. 1-12 of the paper); values in ``conf/ldt``."""

    enabled: bool = MISSING  # train with them; follows method.ldt unless overridden
    phi: Share = MISSING  # eigenvalues above phi * max are discriminants
    alpha: Annotated[Any, kinds.Weight] = MISSING  # of the discriminating term; auto: alpha_share
    beta: Annotated[Any, kinds.Weight] = MISSING  # of the covariance term; auto: by beta_share
    # of alpha=auto: the size of the term's gradient at the neck over the detection loss's
    alpha_share: Share = MISSING
    beta_share: Share = MISSING  # of beta=auto: likewise
    # of auto: once, or again in each epoch, so that the shares are held while gradients change
    estimation: Annotated[str, kinds.Estimation] = "once"
    ridge: NotNegative = MISSING  # S_w + (ridge tr(S_w)/C + ridge_absolute) I
    ridge_absolute: NotNegative = MISSING  # see ridge
    # mean or sum over eq. 11's off-diagonal entries; correlation: of channels scaled to variance 1
    covariance: Annotated[str, kinds.Covariance] = MISSING
    # alpha and beta rise linearly from 0; auto: once estimated
    warmup_epochs: NotNegative = MISSING
    memory: NaturalNumber = MISSING  # previous batches whose (detached) object vectors are added
    # the background as a class; auto: if there is but one
    background: Annotated[Any, bool | Literal["auto"]] = "auto"
    gather: bool = MISSING  # compute scatter matrices from the objects of all processes


@dataclass
class MethodConfig:
    """A pruning method: a criterion, its ranking, and whether LDT is on while training."""

    name: str = MISSING  # in the names of runs
    title: str | None = None  # in tables and figures; default: its name
    ldt: bool = False  # whether LDT's losses are on while training (ldt.enabled)
    ranking: Annotated[str, kinds.Ranking] = "global"  # how scores of layers are compared
    inner_rounds: Count = 1  # score-and-prune steps per round, without training in between
    criterion: dict[str, Any] | None = None  # the class (_target_) and its arguments
    gradual: dict[str, Any] | None = None  # mask channels while training (GradualPruning's keys)


@dataclass
class LatencyConfig:
    """Where the latency of budget=latency is measured."""

    runtime: Annotated[str, kinds.RuntimeName] = "onnxruntime"  # what executes the network
    precision: Annotated[str, kinds.Precision] = "f32"  # of its arithmetic
    threads: Count = 1  # of the runtime
    target_ms: Positive | None = None  # to reach after the last round, instead of prune.rate


@dataclass
class PruneConfig:
    """How much is removed, in how many rounds, and where."""

    rate: Share = MISSING  # share of the unpruned model's budget removed after the last round
    # of pruning and retraining; 0: the base alone, whatever the method, as with method=none
    rounds: NaturalNumber = MISSING
    budget: Annotated[str, kinds.BudgetName] = "params"  # what the rate counts; flops means macs
    # modules to prune; `encoder` and `decoder` of a transformer behind the neck may be among them
    scope: list[str] = field(default_factory=lambda: ["backbone", "neck"])
    max_layer_rate: kinds.LayerShare = 0.95  # maximum share of a layer that is removed
    min_channels: Count = 4  # minimum number of channels kept per layer
    # a pruned layer keeps a multiple: 8, 16; 0: any; auto: 16 with budget=latency
    round_to: kinds.RoundTo = 0
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    images: Count = 128  # calibration images
    batch_size: Count = 16  # calibration images per forward pass
    # bn: estimate batch norms' statistics again; lstsq: refit the weights that read them before
    repair: Annotated[str, kinds.Repair] = "none"
    # random: as many channels of each group, at random (a control)
    channels: Annotated[str, kinds.Channels] = "scored"
    weights: Annotated[str, kinds.Weights] = "kept"  # fresh: random ones after a cut (a control)


@dataclass
class DistillConfig:
    """What retraining takes over from the unpruned base (:mod:`ldt.callbacks.distillation`)."""

    neck: NotNegative = 0.0  # weight of the divergence of the neck's maps; 0: off
    head: NotNegative = 0.0  # weight of the divergence of the predictors' outputs; 0: off
    temperature: Positive = 1.0  # of the softmax over positions


@dataclass
class DatasetConfig:
    """Keys shared by all data sets; ``_target_`` is the LightningDataModule."""

    _target_: str = MISSING  # the class
    name: str = MISSING  # in the names of runs and in tables
    root: str | None = None  # the folder
    # the headline metric: AP is COCO's, mAP is VOC's (IoU 0.5), kitti_* are KITTI's
    metric: kinds.Metric = MISSING
    # per image and class that count for AP; also the detector's max_per_img
    max_detections: Count = 100
    # input (width, height) per detector.size
    scales: dict[str, list[int]] = field(default_factory=dict)
    # input (width, height) in pixels
    scale: Annotated[list[int], list[kinds.Side]] = field(default_factory=list)
    keep_ratio: bool = True  # fit images inside of `scale`; false: stretch them to it
    # processes that load images; auto: one for each CPU at hand but one, at most 16
    workers: Annotated[Any, kinds.Workers] = 2
    val_batch_size: Count = 16  # validation images per batch and process
    group_shapes: bool = False  # batches of like shapes: little padding
    filter_empty_gt: bool = False  # train on images with objects only
    min_size: NaturalNumber = 0  # smallest side of a training image, in pixels
    max_pixels: Count = 64_000_000  # of an image; larger ones are refused before they are decoded


@dataclass
class RoadScenesConfig(DatasetConfig):
    """The generated data set."""

    cache: str | None = None  # folder to write to; null: $LDT_CACHE, else ~/.cache/ldt
    train: kinds.SceneCount = 512  # training images
    val: kinds.SceneCount = 192  # validation images
    height: kinds.SceneHeight = 128  # of an image, in pixels
    width: kinds.SceneWidth = 256  # of an image, in pixels
    scene_seed: kinds.Seed = 0  # of the scenes; runs with different seeds share them
    # of clutter, crowding, bad light and noise; 0: clean, 1: hard
    difficulty: kinds.Difficulty = 0.1


@dataclass
class KittiConfig(DatasetConfig):
    """KITTI's object detection benchmark."""

    grouping: Annotated[str, kinds.Grouping] = "merged"  # merged: a Van is a Car, and so on
    # KITTI's types or names of your own; other types are ignored regions
    classes: list[str] = field(default_factory=lambda: ["Car", "Pedestrian", "Cyclist"])
    train_fraction: float = 0.8  # of the images, if there is no ImageSets/train.txt and val.txt
    split_seed: int = 0  # of this split; runs with different seeds share it
    images: str | None = None  # list of the images that take part: a file, or one of conf/images
    folds: NaturalNumber = 0  # contiguous blocks of the sorted images; 0: a random split
    fold: NaturalNumber = 0  # the block for validation
    gap: NaturalNumber = 4  # images left out of training on either side of it
    reserved_folds: NaturalNumber = 0  # so many of the last blocks are for a last, single look
    open_reserved: bool = False  # allow `fold` to be one of these


@dataclass
class CocoConfig(DatasetConfig):
    """Any data set in COCO's format."""

    train_ann: str = "annotations/instances_train2017.json"  # annotation file, below dataset.root
    train_img: str = "train2017"  # image folder, below dataset.root
    val_ann: str = "annotations/instances_val2017.json"  # annotation file for validation
    val_img: str = "val2017"  # image folder for validation
    train_images: str | None = None  # list of the images that take part: a file or of conf/images
    val_images: str | None = None  # the same for validation
    classes: list[str] | None = None  # of the file, in any order; null: the 80 of COCO


DATASETS: dict[str, type[DatasetConfig]] = {  # by option of the group
    "roadscenes": RoadScenesConfig,
    "kitti": KittiConfig,
    "coco": CocoConfig,
}


@dataclass
class TrainerConfig:
    """Arguments of ``lightning.Trainer`` (null: its default), and three keys of ldt.

    Arguments controlled by the prune-retrain loop are in :data:`ldt.config.keys.OWNED`.
    """

    accelerator: str = "auto"  # cpu, gpu or auto
    devices: Any = "auto"  # how many, a list of them, or auto: all
    strategy: str = "auto"  # for several devices: ddp, ddp_find_unused_parameters_true
    num_nodes: Count = 1  # machines
    precision: str = "32-true"  # 32-true, 16-mixed, bf16-mixed
    # true: raise if CUDA has no deterministic kernel
    deterministic: Annotated[Any, bool | Literal["warn"]] = "warn"
    sync_batchnorm: bool = False  # batch norms share statistics between GPUs
    log_every_n_steps: NaturalNumber = 10  # of training, in metrics.csv; 0: none
    limit_train_batches: kinds.Limit = None  # of an epoch: so many, or a share
    limit_val_batches: kinds.Limit = None  # of a validation: so many, or a share
    accumulate_grad_batches: Count = 1  # recipe.batch_size is split into so many parts
    gradient_clip_algorithm: kinds.ClipAlgorithm | None = None  # for recipe.clip_grad
    fast_dev_run: bool | int = False  # batches per epoch; no logging, no resuming
    overfit_batches: int | float = 0.0  # train on so many batches, or a share, only
    benchmark: bool | None = None  # cuDNN searches the fastest kernels
    inference_mode: bool | None = None  # validate in torch.inference_mode instead of no_grad
    use_distributed_sampler: bool | None = None  # for validation; training has its own sampler
    profiler: kinds.Profiler | None = None  # of Lightning
    detect_anomaly: bool | None = None  # of autograd: slow
    enable_progress_bar: bool = True  # a bar in a terminal, lines elsewhere
    enable_model_summary: bool = False  # of Lightning, before training
    enable_autolog_hparams: bool | None = None  # hyperparameters go to the logger
    validate_every: NaturalNumber = 0  # in epochs; 0: only at the end of a phase
    threads: Count | None = None  # of torch on the CPU; null: torch's default
    compile: bool = False  # torch.compile the backbone and the neck for training steps


@dataclass
class ReportConfig:
    """What is measured and drawn."""

    latency_runs: NaturalNumber = 30  # 0: do not measure; else at least 30
    # in which a detector's latency is measured, besides latency_ms
    runtimes: Annotated[list[str], list[kinds.RuntimeName]] = field(default_factory=list)
    pictures: NaturalNumber = 8  # validation images drawn; 0: no detector is run for pictures
    figures: bool = True  # draw figures and count every layer's cost, when the run is finished
    # keep the detections of every round's validation (detections-<t>.npz), which figures show
    detections: bool = True
    before_retraining: bool = True  # validate after each cut too: a round's cut/AP


@dataclass
class Config:
    """One run."""

    detector: DetectorConfig = field(default_factory=DetectorConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    ldt: LDTConfig = field(default_factory=LDTConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    dataset: Any = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    logger: dict[str, Any] = field(default_factory=dict)  # beside the CSV files
    study: str = "default"  # folder below runs/; runs of one study are compared with each other
    # shared: runs of a study that differ in method and prune share their base training
    base: Annotated[str, Literal["own", "shared"]] = "own"
    # values that a sweeper optimises; []: the headline metric, dataset.metric
    objectives: Annotated[list[str], list[kinds.Objective]] = field(default_factory=list)
    seed: kinds.Seed = 0  # of initial weights, order of images, augmentation
    # folder below the study; by default from the keys that tell runs apart
    run_name: str = MISSING


def as_dict(config: object, resolve: bool = True, throw_on_missing: bool = False) -> dict[str, Any]:
    """Return a configuration, or a group of it, as plain data."""
    plain = OmegaConf.to_container(config, resolve=resolve, throw_on_missing=throw_on_missing)
    return cast(dict[str, Any], plain)


def conf_dir() -> Path:
    """Return the config folder: ``conf`` in a checkout, ``ldt/conf`` in an installed wheel."""
    package = Path(str(files("ldt")))
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


@cache
def packaged_targets() -> frozenset[str]:
    """Return the classes that the files of the config folder name."""
    texts = (file.read_text(encoding="utf-8") for file in conf_dir().rglob("*.yaml"))
    return frozenset(re.findall(r"_target_: *([\w.]+)", "\n".join(texts)))


@cache
def methods() -> dict[str, dict[str, Any]]:
    """Return the content of each yaml in ``conf/method``, by its name without the suffix."""
    files = (conf_dir() / "method").glob("*.yaml")
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}


def untrained_methods() -> dict[str, dict[str, Any]]:
    """Return the methods whose criterion works without training."""
    return {
        name: content
        for name, content in methods().items()
        if content.get("criterion") and not content.get("gradual")
    }


def method_titles() -> dict[str, str]:
    """Return the title of each method that has one, by its name."""
    return {
        content["name"]: content["title"] for content in methods().values() if "title" in content
    }


@cache
def register() -> None:
    """Register the schema with Hydra and the run-name resolver with OmegaConf."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name, node in DATASETS.items():
        store.store(group="dataset", name=f"{name}_schema", node=node)
    OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
    OmegaConf.register_new_resolver("from_config", _from_config, replace=True)


def _run_name(overrides: object, *, _root_: Any) -> str:
    """Look the function up by its dotted path: the schema must not import ``ldt.runs``."""
    from hydra.utils import get_method

    return get_method("ldt.runs.identity.run_name")(overrides, _root_)


def _from_config(key: str, *, _root_: Any) -> Any:
    """Return a key as the mmdet config of ``detector.config`` says; read once a configuration.

    Args:
        key: of the recipe (``optimizer.lr``), or ``detector.`` and one of the detector.
    """
    from hydra.utils import get_method

    path, known = _root_.detector.config, OmegaConf.get_cache(_root_)["from_config"]
    if path not in known:
        known[path] = get_method("ldt.detectors.recipes.ConfigRecipe")(path)
    group, _, name = key.rpartition(".")
    return known[path].of_detector(name) if group == "detector" else known[path].read(key)
