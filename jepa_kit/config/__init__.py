"""Configs: from YAML to checked values.

    config = load_config("in1k_vitb16", ["masker.num_targets=8", "optim.lr=1e-3"])
    MASKERS.build(config.slots["masker"].name, config.slots["masker"].options, grid=grid)

load.py      reads YAML files with their bases, run folders, checkpoints and overrides
renamed.py   replaces old names of options and parts
imports.py   imports user-defined parts
sections.py  options that belong to no part
shipped.py   finds configs of projects by name
check.py     checks all options against sections and signatures of parts
resolved.py  Config, and the functions that return one
"""

from jepa_kit.config.check import Part
from jepa_kit.config.renamed import modernize
from jepa_kit.config.resolved import Config, config_from_dict, import_named, load_config, versions
from jepa_kit.config.sections import SECTIONS, CheckpointConfig, DataConfig, EvaluateConfig, OptimConfig, TrainConfig
from jepa_kit.config.shipped import shipped_configs
from jepa_kit.errors import ConfigError
from jepa_kit.registry import located
from jepa_kit.run_folder import RUN_CONFIG

__all__ = [
    "RUN_CONFIG",
    "SECTIONS",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "OptimConfig",
    "Part",
    "TrainConfig",
    "config_from_dict",
    "import_named",
    "load_config",
    "located",
    "modernize",
    "shipped_configs",
    "versions",
]
