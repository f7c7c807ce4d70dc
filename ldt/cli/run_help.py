"""`ldt run --help`: examples, groups and every key, with values as composed."""

import click
from omegaconf import DictConfig, OmegaConf

from ldt.config import as_dict, reference
from ldt.config.values import typed

WIDTH = 110
OBVIOUS = ("", "a text", "true or false")
LONGEST = 32  # of a shown value, in characters
EXAMPLES = """\
  ldt run                                    the generated data set, 2 to 5 minutes on a CPU
  ldt run method=l1 prune.rate=0.5           another method, another rate
  ldt run dataset=kitti dataset.root=/data/kitti detector=yolox_nano
  ldt run -m method=ldt,l1 prune.rate=0.5,0.7 seed=0,1 base=shared study=compare      a sweep
  ldt run detector=yolox_s --help            the values of these keys with another detector
  ldt run method=l1 --cfg job                the whole configuration, as it would run
"""


def page(config: DictConfig) -> str:
    """Return the help for a composed configuration."""
    out = click.HelpFormatter(max_width=WIDTH)
    out.write_usage("ldt run", "[GROUP=OPTION...] [KEY=VALUE...]")
    out.write("\n")
    out.write_text(
        "Train a detector, prune it, retrain it, round after round; `python run.py` is the same. "
        "With -m, a list of values is a sweep. --cfg job shows the configuration, --hydra-help "
        "Hydra's own flags."
    )
    out.write(f"\nExamples:\n{EXAMPLES}")
    for group in reference.option_groups():
        with out.section(f"{group}=..."):
            options = reference.options(group)
            if group == "experiment":  # many: keys.md tells what they are
                out.write_text(", ".join(options))
            else:
                out.write_dl(list(options.items()))
    out.write("\nKeys, with their values here:\n")
    for group in reference.groups():
        if _is_of(group, config):
            _write_keys(out, group.meaning if group.name else "", group.keys(), config)
    criterion = as_dict(config, resolve=False)["method"].get("criterion")
    if criterion:
        arguments = [name for name in criterion if not name.startswith("_")]
        keys = reference.class_keys("method.criterion", criterion["_target_"], arguments)
        _write_keys(out, f"The criterion of method={config.method.name}", keys, config)
    out.write("\nThe options of other groups have further keys: docs/keys.md lists all.\n")
    return out.getvalue()


def _is_of(group: reference.Group, config: DictConfig) -> bool:
    """Whether the configuration has the keys of a group."""
    own = OmegaConf.get_type(config.dataset)
    return group.option is None or group.schema is own


def _write_keys(
    out: click.HelpFormatter, title: str, keys: list[reference.Key], config: DictConfig
) -> None:
    plain = as_dict(config, resolve=False)
    rows = []
    for key in keys:
        value: object = plain
        for part in key.name.split("."):
            value = value[part] if isinstance(value, dict) and part in value else key.default
        allowed = f" ({key.allowed})" if key.allowed not in OBVIOUS else ""
        rows.append((f"{key.name}={_short(value)}", f"{key.meaning}{allowed}".replace("``", "`")))
    if rows:
        with out.section(title or "The run"):
            out.write_dl(rows, col_max=34)


def _short(value: object) -> str:
    text = "{...}" if isinstance(value, dict) and value else typed(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
