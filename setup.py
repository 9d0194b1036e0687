"""Installs `jepa_kit`, with commands for its tools. A wheel has projects/ and reference/ inside jepa_kit/."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"$', (here / "jepa_kit" / "__init__.py").read_text(), re.MULTILINE).group(1)
readme = here / "README.md"

TOOLS = {
    "jepa-train": "train_net",
    "jepa-eval": "eval_net",
    "jepa-shards": "make_shards",
    "jepa-health": "health",
    "jepa-masks": "mask_report",
    "jepa-plan": "plan_run",
    "jepa-compare": "compare",
    "jepa-ablate": "ablate",
    "jepa-convert": "convert_checkpoint",
    "jepa-convert-config": "convert_config",
    "jepa-visualize": "visualize",
    "jepa-demo": "demo",
    "jepa-replay": "replay_step",
    "jepa-runs": "runs",
}
"""Command -> module of jepa_kit.tools."""


class BuildWithFolders(build_py):
    """Copies projects/ and reference/ into the package; an editable install uses those of the clone."""

    def run(self):
        super().run()
        for name in () if self.editable_mode else ("projects", "reference"):
            target = Path(self.build_lib, "jepa_kit", name)
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build
            shutil.copytree(here / name, target, ignore=shutil.ignore_patterns("__pycache__"))


setup(
    name="jepa_kit",
    version=version,
    description="A toolkit for joint-embedding predictive architectures (I-JEPA and its variants) in PyTorch",
    long_description=readme.read_text() if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["jepa_kit", "jepa_kit.*"]),
    # With the root named, an editable install puts the clone itself on the path, so that `imports: [projects.x.y]`
    # in a config works from anywhere; without it, setuptools would map jepa_kit alone.
    package_dir={"": "."},
    package_data={"jepa_kit": ["py.typed"], "jepa_kit.demo": ["static/*"]},
    cmdclass={"build_py": BuildWithFolders},
    entry_points={"console_scripts": [f"{name} = jepa_kit.tools.{module}:main" for name, module in TOOLS.items()]},
    install_requires=[
        "torch>=2.10,<2.14",
        # Wheels exist for Linux on x86-64 only; elsewhere attention uses torch's own kernels, and so it does beside
        # torch for CUDA 13: the wheel needs the CUDA 12 runtime that torch 2.10 brings. The extra "xformers" is a pair.
        'xformers>=0.0.35; sys_platform == "linux" and platform_machine == "x86_64"',
        "einops>=0.8",
        "fvcore>=0.1.5.post20221221",
        "iopath>=0.1.10",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pillow>=10.3",
        "pyyaml>=6.0.1",
        "safetensors>=0.4.3",
        "scikit-learn>=1.4",
        "tensorboard>=2.16",
        "tqdm>=4.66",
        "webdataset>=0.2.86",
    ],
    extras_require={
        "docs": ["ipykernel>=6.29", "mkdocs-material>=9.7,<10", "nbconvert>=7.16", "pandas>=2.2"],
        "fast": ["simplejpeg>=1.8"],
        "hf": ["datasets>=3.0"],
        "onnx": ["onnx>=1.16", "onnxruntime>=1.17"],
        "slurm": ["submitit>=1.5"],
        "wandb": ["wandb>=0.17"],
        "xformers": ["torch==2.10.*", "xformers==0.0.35"],
        "dev": [
            "datasets>=3.0",
            "hypothesis>=6.100",
            # Both change their verdicts between releases, and lint is part of `make test`.
            "mypy>=2.4,<2.5",
            "onnx>=1.16",
            "onnxruntime>=1.17",
            "ruff>=0.17.5,<0.18",
            "pre-commit>=3.7",
            "pytest>=8.2",
            "pytest-xdist>=3.6.1",
            "scipy>=1.11",
            "simplejpeg>=1.8",
            "submitit>=1.5",
            "transformers>=5.0",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)
