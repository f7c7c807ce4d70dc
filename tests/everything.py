"""All that a command may import, imported; garbage collections pass these objects over."""

import gc
from importlib import import_module

from hydra.core.plugins import Plugins

for name in ("ldt.experiment", "ldt.figures.from_runs", "mmdet.models", "torch_pruning", "wandb"):
    import_module(name)
Plugins.instance()  # finds and imports Hydra's plugins
gc.collect()
gc.freeze()
