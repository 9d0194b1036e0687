"""Configs: from YAML to checked values.

    config = load_config("ijepa/in1k_vitb16", ["masker.num_targets=8", "optim.lr=1e-3"])
    MASKERS.build(config.slots["masker"].name, config.slots["masker"].options, grid=grid)

load.py      reads YAML files with their bases, run folders, checkpoints and overrides
renamed.py   replaces old names of options and parts
imports.py   imports user-defined parts
sections.py  options that belong to no part; data_section.py: those of the images; section.py: the base of both
shipped.py   finds configs of projects by name
check.py     checks all options against sections and signatures of parts; typed.py: plain YAML to annotated types
resolved.py  Config, and the functions that return one
"""

from jepa_kit.config.data_section import DataConfig
from jepa_kit.config.renamed import modernize
from jepa_kit.config.resolved import Config, config_from_dict, load_config, versions
from jepa_kit.errors import ConfigError

__all__ = ["Config", "ConfigError", "DataConfig", "config_from_dict", "load_config", "modernize", "versions"]
