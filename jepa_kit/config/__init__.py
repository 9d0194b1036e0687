"""Configs: YAML in, checked values out.

    config = load_config("projects/ijepa/configs/NAME.yaml", ["masker.num_targets=8", "optim.lr=1e-3"])
    MASKERS.build(config.slots["masker"].name, config.slots["masker"].options, grid=grid)

yaml_text.py reads and writes text, sources.py files with their bases, merging.py lays one config over another,
imports.py brings in parts from elsewhere, typed.py and checking.py hold the result against the signatures of the
parts and of sections.py, resolved.py keeps it. arguments.py has what the command lines of tools share.
"""

from jepa_kit.config.checking import Part
from jepa_kit.config.errors import located
from jepa_kit.config.renamed import modernize
from jepa_kit.config.resolved import Config, config_from_dict, import_named, load_config
from jepa_kit.config.sections import SECTIONS, CheckpointConfig, DataConfig, EvaluateConfig, OptimConfig, TrainConfig
from jepa_kit.config.versions import versions
from jepa_kit.errors import ConfigError
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
    "versions",
]
