"""Typed schema of all configuration keys.

Hydra merges the files of ``conf/`` into these dataclasses, so that a misspelt key or a value of
the wrong type raises before any model is built, naming the key. Unknown keys added with ``+`` are
rejected by :func:`ldt.config.keys.check_keys`.
"""

import re
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from omegaconf import MISSING, OmegaConf


@dataclass
class DetectorConfig:
    """An mmdet detector: base config, changes to it, and the module that LDT uses."""

    name: str = MISSING
    config: str = MISSING  # a config file, or mmdet::<family>/<file> for a packaged one
    options: dict[str, Any] = field(default_factory=dict)  # merged into the config's `model`
    checkpoint: str | None = None  # weights of the whole detector, mmdet's or ours
    pretrained: bool = False  # load the pretrained backbone that the config names
    neck: str = "auto"  # module whose output LDT acts on
    predictors: list[str] | None = None  # modules never pruned; null: detected automatically
    size: str = "full"  # full | tiny: picks the input scale of a data set
    pad: str = "none"  # none | square: YOLOX pads every image to the input scale
    mosaic_scale: list[float] = field(default_factory=lambda: [0.1, 2.0])  # of augment=mosaic
    mixup: bool = True  # of augment=mosaic


@dataclass
class RecipeConfig:
    """How a detector is trained: epochs, optimizer (mmengine's keys), schedule, augmentation."""

    epochs: int = MISSING  # base training; 0 starts from detector.checkpoint
    retrain_epochs: int = MISSING  # after each pruning step
    batch_size: int = MISSING  # images per optimizer step, over all processes
    base_batch_size: int | None = (
        None  # batch size the learning rate is given for; null: no scaling
    )
    optimizer: dict[str, Any] = field(default_factory=dict)  # mmengine's keys, `type` first
    paramwise: dict[str, Any] = field(default_factory=dict)
    schedule: str = "step"  # step | cosine | constant
    milestones: list[float] = field(default_factory=lambda: [2 / 3, 11 / 12])  # shares of a phase
    gamma: float = 0.1  # factor at each milestone
    warmup: int = 500  # steps, at most a fifth of a phase
    warmup_epochs: float = 0.0  # above 0: instead of `warmup`
    warmup_shape: str = "linear"  # linear | quadratic | constant
    warmup_start: float | None = None  # share of the learning rate at first; null: 1 / steps
    min_lr: float = 0.0  # final share of the learning rate of the cosine schedule
    cosine: list[float] = field(default_factory=list)  # begin, end, half period: shares of a phase
    retrain_lr: float = 1.0  # share of the learning rate used while retraining
    clip_grad: float | None = None  # maximum gradient norm
    channels_last: bool = False  # images and feature maps in NHWC order: a fifth faster on CPUs
    ema: float | None = None  # mmdet's ExpMomentumEMA momentum; null = no moving average
    augment: str = "flip"  # none | flip | shift | mosaic | config: what `pipeline` says
    plain_epochs: int = 0  # last epochs of a phase without mosaic
    plain_l1: bool = True  # with YOLOX's L1 loss in these epochs
    pipeline: list[Any] = field(default_factory=list)  # of augment=config: mmdet's transforms
    plain_pipeline: list[Any] = field(default_factory=list)  # that of the plain epochs


@dataclass
class LDTConfig:
    """Eqs. 1-12 of the paper; values in ``conf/ldt``, defaults in :mod:`ldt.discriminant`."""

    enabled: bool = MISSING  # follows method.ldt unless overridden
    phi: float = MISSING  # eigenvalues above phi * max are discriminants
    alpha: Any = MISSING  # weight of the discriminating term; auto: by its gradient's size
    beta: Any = MISSING  # weight of the covariance term; auto: by its gradient's size
    alpha_share: float = MISSING  # auto: the term's gradient at the neck over the detection loss's
    beta_share: float = MISSING
    ridge: float = MISSING  # S_w + (ridge tr(S_w)/C + ridge_absolute) I
    ridge_absolute: float = MISSING
    covariance: str = MISSING  # mean | sum over eq. 11's off-diagonal entries | correlation: scaled
    warmup_epochs: float = MISSING  # alpha and beta rise linearly from 0; auto: once estimated
    memory: int = MISSING  # previous batches whose (detached) object vectors are added
    background: Any = "auto"  # true | false | auto: the background as a class, if there is but one
    gather: bool = MISSING  # compute scatter matrices from the objects of all processes


@dataclass
class MethodConfig:
    """A pruning method: a criterion, its ranking, and whether LDT is on while training."""

    name: str = MISSING
    ldt: bool = False
    ranking: str = "global"  # global | global_per_cost | global_normalised | uniform
    inner_rounds: int = 1  # score-and-prune steps per round, without training in between
    criterion: dict[str, Any] | None = None
    gradual: dict[str, Any] | None = None  # mask channels while training (GradualPruning's keys)


@dataclass
class PruneConfig:
    """How much is removed, in how many rounds, and where."""

    rate: float = MISSING  # share of the unpruned model's budget removed after the last round
    rounds: int = MISSING
    budget: str = "params"  # params | flops
    scope: list[str] = field(default_factory=lambda: ["backbone", "neck"])
    max_layer_rate: float = 0.95  # maximum share of a layer that is removed
    min_channels: int = 4  # minimum number of channels kept per layer
    images: int = 128  # calibration images
    batch_size: int = 16  # calibration images per forward pass
    repair: str = "none"  # bn | none: re-estimate the statistics of batch norms after pruning


@dataclass
class DatasetConfig:
    """Keys shared by all data sets; ``_target_`` is the LightningDataModule."""

    _target_: str = MISSING
    name: str = MISSING
    root: str | None = None
    metric: str = MISSING  # the headline metric: AP (COCO), mAP (VOC, IoU 0.5), kitti_moderate ...
    max_detections: int = 100  # per image and class that count for AP; also detector's max_per_img
    scales: dict[str, list[int]] = field(
        default_factory=dict
    )  # input (width, height) per detector.size
    scale: list[int] = field(default_factory=list)
    keep_ratio: bool = True
    workers: Any = 2  # processes that load images; auto: by the CPUs at hand
    val_batch_size: int = 16
    group_shapes: bool = False  # batches of like shapes: little padding
    filter_empty_gt: bool = False  # train on images with objects only
    min_size: int = 0  # smallest side of a training image, in pixels
    max_pixels: int = 64_000_000  # of an image; larger ones are refused before they are decoded


@dataclass
class RoadScenesConfig(DatasetConfig):
    """The generated data set."""

    cache: str | None = None
    train: int = 512
    val: int = 192
    height: int = 128
    width: int = 256
    scene_seed: int = 0
    difficulty: float = 0.1


@dataclass
class KittiConfig(DatasetConfig):
    """KITTI's object detection benchmark."""

    grouping: str = "merged"  # merged | strict
    classes: list[str] = field(default_factory=lambda: ["Car", "Pedestrian", "Cyclist"])
    train_fraction: float = 0.8
    split_seed: int = 0


@dataclass
class CocoConfig(DatasetConfig):
    """Any data set in COCO's format."""

    train_ann: str = "annotations/instances_train2017.json"
    train_img: str = "train2017"
    val_ann: str = "annotations/instances_val2017.json"
    val_img: str = "val2017"
    classes: list[str] | None = None


@dataclass
class TrainerConfig:
    """Arguments of ``lightning.Trainer`` (null: its default), and three keys of ldt.

    Arguments controlled by the prune-retrain loop are in :data:`ldt.config.keys.OWNED`.
    """

    accelerator: str = "auto"
    devices: Any = "auto"
    strategy: str = "auto"
    num_nodes: int = 1
    precision: str = "32-true"
    deterministic: Any = "warn"  # true: raise if CUDA has no deterministic kernel
    sync_batchnorm: bool = False
    log_every_n_steps: int = 10
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    accumulate_grad_batches: int = 1  # recipe.batch_size is split into so many parts
    gradient_clip_algorithm: str | None = None  # norm | value, for recipe.clip_grad
    fast_dev_run: bool | int = False  # batches per epoch; no logging, no resuming
    overfit_batches: int | float = 0.0
    benchmark: bool | None = None
    inference_mode: bool | None = None
    use_distributed_sampler: bool | None = None  # for validation; training has its own sampler
    profiler: str | None = None  # simple | advanced | pytorch
    detect_anomaly: bool | None = None
    enable_progress_bar: bool = True
    enable_model_summary: bool = False
    enable_autolog_hparams: bool | None = None
    validate_every: int = 0  # ldt: in epochs; 0 = only at the end of a phase
    threads: int | None = None  # ldt: torch CPU threads; null = torch's default
    compile: bool = False  # ldt: torch.compile the backbone and the neck for training steps


@dataclass
class ReportConfig:
    """What is measured and drawn."""

    latency_runs: int = 30  # 0 = do not measure
    pictures: int = 8  # validation images drawn; 0: no detector is run for pictures


@dataclass
class Config:
    """One run."""

    detector: DetectorConfig = field(default_factory=DetectorConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    ldt: LDTConfig = field(default_factory=LDTConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    dataset: Any = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    logger: dict[str, Any] = field(default_factory=dict)
    study: str = "default"
    base: str = "own"  # own | shared: shared: train the base once for all runs of a study
    objectives: list[str] = field(
        default_factory=list
    )  # values returned to the sweeper; [] = the metric
    seed: int = 0
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


def register() -> None:
    """Register the schema with Hydra and the run-name resolver with OmegaConf."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name, node in (
        ("roadscenes", RoadScenesConfig),
        ("kitti", KittiConfig),
        ("coco", CocoConfig),
    ):
        store.store(group="dataset", name=f"{name}_schema", node=node)
    OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
    OmegaConf.register_new_resolver("from_config", _from_config, replace=True)


def _run_name(overrides: Any, *, _root_: Any) -> str:
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
