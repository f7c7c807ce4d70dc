"""What is used of other libraries without being documented is still there.

When one of these fails after an upgrade, mend the file that is named: nothing else uses it.
"""

import inspect

import lightning as L
import pytest
import torch
import torch_pruning as tp
from hydra._internal import hydra, utils
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from mmengine.config import config
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import registry
from torch import nn

import ldt  # noqa: F401  (mmcv's operators)
from ldt.cli import hydra_app
from ldt.pruning import torch_pruning_internals as internals

TORCH_PRUNING = "ldt/pruning/torch_pruning_internals.py and ldt/pruning/dependency.py"
LIGHTNING = "ldt/callbacks/lightning_internals.py"
MMENGINE = "ldt/detectors/mmengine_internals.py"
HYDRA, SWEEPER = "ldt/cli/hydra_app.py", "hydra_plugins/ldt_grids.py"


def parameters(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("owner", "name", "expected", "file"),
    [
        (tp.DependencyGraph, "_trace",
         ["self", "model", "example_inputs", "forward_fn", "output_transform"], TORCH_PRUNING),
        (tp.DependencyGraph, "get_pruner_of_module", ["self", "module"], TORCH_PRUNING),
        (tp.DependencyGraph, "get_pruning_group", ["self", "module", "pruning_fn", "idxs"],
         TORCH_PRUNING),
        (tp.DependencyGraph, "is_out_channel_pruning_fn", ["self", "fn"], TORCH_PRUNING),
        (tp.DependencyGraph, "is_in_channel_pruning_fn", ["self", "fn"], TORCH_PRUNING),
        (tp.BasePruningFunc, "_prune_parameter_and_grad",
         ["self", "weight", "keep_idxs", "pruning_dim"], TORCH_PRUNING),
        (Strategy, "setup_optimizers", ["self", "trainer"], LIGHTNING),
        (DDPStrategy, "configure_ddp", ["self"], LIGHTNING),
        (WeightAveraging, "_copy_average_to_current", ["self", "pl_module"], LIGHTNING),
        (WeightAveraging, "setup", ["self", "trainer", "pl_module", "stage"], LIGHTNING),
        (_SignalConnector, "register_signal_handlers", ["self"], LIGHTNING),
        (_SubprocessScriptLauncher, "kill", ["self", "signum"], LIGHTNING),
        (hydra_app, "COMPOSE_ALL", ["self", "batch"], HYDRA),
        (registry, "get_object_from_string", ["obj_name"], MMENGINE),
        (config, "is_installed", ["package"], MMENGINE),
        (config, "get_installed_path", ["package"], MMENGINE),
        (utils, "get_args_parser", [], HYDRA),
        (hydra.Hydra, "compose_config",
         ["self", "config_name", "overrides", "run_mode", "with_log_configuration",
          "from_shell", "validate_sweep_overrides"], HYDRA),
        (utils, "run_and_report", ["func"], HYDRA),
        (hydra, "ConfigLoaderImpl", ["config_search_path"], HYDRA),
        (ConfigLoaderImpl, "load_configuration",
         ["self", "config_name", "overrides", "run_mode", "from_shell",
          "validate_sweep_overrides"], HYDRA),
        (utils, "_run_hydra",
         ["args", "args_parser", "task_function", "config_path", "config_name",
          "caller_stack_depth"], HYDRA),
        (BasicSweeper, "sweep", ["self", "arguments"], SWEEPER),
        (BasicSweeper, "split_arguments", ["overrides", "max_batch_size"], SWEEPER),
        (BasicSweeper, "split_overrides_to_chunks", ["lst", "n"], SWEEPER),
    ],
)  # fmt: skip
def test_a_function_takes_what_it_took(owner, name, expected, file):
    function = getattr(owner, name, None)
    assert function is not None, f"{owner.__name__}.{name} is gone: mend {file}"
    found = parameters(function)
    assert found == expected, f"{owner.__name__}.{name} takes {found} now: mend {file}"


def test_an_average_and_a_preprocessor_have_what_is_set():
    assert WeightAveraging()._average_model is None, f"the average: mend {LIGHTNING}"
    assert BaseDataPreprocessor()._non_blocking is False, f"copies: mend {MMENGINE}"


def test_a_group_of_torch_pruning_has_what_is_read():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    import torch

    graph = tp.DependencyGraph().build_dependency(net, torch.zeros(1, 3, 4, 4))
    group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, [0, 1, 2, 3])
    assert graph.module2node[net[0]].outputs[0].module is net[1], f"nodes: mend {TORCH_PRUNING}"
    sides = {
        item.dep.target.module: internals.prunes_outputs(group, item.dep) for item in group.items
    }
    assert sides[net[0]], f"groups: mend {TORCH_PRUNING}"
    assert not sides[net[2]], f"groups: mend {TORCH_PRUNING}"
    assert all(item.root_idxs == [0, 1, 2, 3] for item in group.items), f"mend {TORCH_PRUNING}"


class Scaled(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 1))
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))

    def forward(self, x):
        return super().forward(x) * self.scale


def test_a_parameter_of_its_own_has_a_name():
    net = Scaled()
    graph = tp.DependencyGraph().build_dependency(net, torch.zeros(1, 3, 4, 4))
    group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, [0, 1, 2, 3])
    assert internals.parameter_name(group, net.scale) == "scale", f"mend {TORCH_PRUNING}"


def test_a_trainer_has_what_is_read():
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", max_epochs=3)
    trainer.fit_loop.max_epochs = 5
    assert trainer.max_epochs == 5, f"the epochs of a running fit: mend {LIGHTNING}"
    assert hasattr(trainer, "interrupted"), f"Trainer.interrupted is gone: mend {LIGHTNING}"
