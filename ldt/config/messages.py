"""One-line messages for errors of Hydra and OmegaConf about overrides and configurations."""

import re

from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from ldt.config.keys import explain_key
from ldt.config.names import choices
from ldt.config.values import allowed

LEXER = "LexerNoViableAltException"
MERGING = "Error merging override "
SIZE = re.compile(r"'dataset\.scales\.([^']+)' not found")  # dataset.scale refers to it
COMPOSING = (HydraException, OmegaConfBaseException, ValueError, ImportError, OSError)


def explained(error: Exception) -> str:
    """Format an error about the command line or configuration, with the allowed values."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group}={option}: {choices(option, error.options)}"
    if told := explain_key(error):
        return told
    if isinstance(error, InterpolationKeyError) and (size := SIZE.search(str(error))):
        return (
            f"detector.size={size[1]}: the data set has no such size in dataset.scales; type "
            "another, or dataset.scale=[<width>,<height>]"
        )
    if isinstance(error, InterpolationResolutionError):  # of a resolver: only its own message
        return _first(str(error)).rpartition(" raised while resolving interpolation: ")[2]
    if isinstance(error, InstantiationException) and cause is not None:
        return str(cause)
    if isinstance(error, AssertionError) and "root: NoneType" in str(error):
        return "a key is added below one that is null, e.g. +method.gradual.x to method=ldt"
    if not isinstance(error, COMPOSING):
        kind = type(error).__name__
        return f"the configuration cannot be composed ({kind}: {_first(str(error))})"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not set; type {error.full_key}=<value>"
    told = _first(str(error))
    if told.startswith(LEXER):
        return (
            f"{told.removeprefix(LEXER).strip(': ')}: quote a text with other signs than letters "
            "a to z, for example 'dataset.classes=[\"große Katze\",hund]'"
        )
    if isinstance(cause, ValidationError) and told.startswith(MERGING):
        override = told.removeprefix(MERGING)
        if kinds := allowed(str(cause.full_key), override.partition("=")[2]):
            return f"{override}; allowed: {kinds}"
    if told.startswith("Config group override must be"):
        return "a group cannot be null: choose one of its options; --help lists them"
    if told.startswith("Multiple values for "):
        group = told.removeprefix("Multiple values for ").partition(".")[0]
        return f"{group} is given twice: type {group}=<option> once, without +"
    if "does not support deletion" in str(cause):
        key = told.partition("override ~")[2]
        return f"~{key}: a key cannot be deleted; type {key}=<value>"
    if told.startswith("Error parsing override") and "missing EQUAL" in told:
        given = told.split("'")[1]
        return f"{given} has no value; type {given}=<value>"
    if told.startswith("Could not append to config. An item is already at"):
        key = told.split("'")[1]
        return f"+{key}: the key is there already; type {key}=... without +"
    return f"{told}: {_first(str(cause))}" if isinstance(cause, OmegaConfBaseException) else told


def _first(message: str) -> str:
    """Strip the search path, schema types and documentation link from a Hydra message."""
    for aside in ("Config search path:", "\n    full_key:", "\nSee https://hydra.cc"):
        message = message.partition(aside)[0]
    message = message.strip()
    return message if message.endswith("...") else message.removesuffix(".")
