"""v4e: video models as image editors."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "v4e/__init__.py").read_text())[1]

setup(
    name="v4e",
    version=VERSION,
    description="Turn video models into few-step image editors by distillation",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["v4e", "v4e.*", "data_tools", "data_tools.*"]),
    package_data={"v4e": ["assets/**/*", "**/*.css"], "data_tools": ["**/*.css"]},
    # Lower bounds are the versions the tests ran with; constraints.txt pins the exact set.
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "diffusers>=0.42.1,<0.43",
        "transformers>=5.17,<6",
        "webdataset>=1.0.2,<2",
        "wandb>=0.31,<0.32",
        "omegaconf>=2.4.0rc1,<2.5",
        "safetensors>=0.6",
        "tokenizers>=0.22",
        "fsspec>=2025.3",
        "universal-pathlib>=0.3.10,<0.4",
        "typing-extensions>=4.10",
        "xxhash>=3.5,<5",
        "pillow>=11",
        "rich>=14",
        "ftfy>=6.3",
        "httpx>=0.28,<1",
        "numpy>=2",
    ],
    extras_require={
        "gpu": ["xformers>=0.0.35,<0.1"],
        "photos": ["pillow-heif>=1.8,<2", "imageio-ffmpeg>=0.8,<0.9"],
        "app": ["gradio>=6.31,<7", "imageio-ffmpeg>=0.8,<0.9"],
        "lora": ["peft>=0.21,<0.22"],
        "8bit": ["bitsandbytes>=0.50.2,<0.51"],
        "parquet": ["pyarrow>=26,<27"],
        "s3": ["s3fs>=2025.3"],
        "gs": ["gcsfs>=2026.3"],
        "http": ["aiohttp>=3.9"],
        "world": ["scikit-image>=0.26,<0.27", "scikit-learn>=1.9,<1.10", "scipy>=1.15"],
        "dev": [
            "pytest>=9",
            "hypothesis>=6.150",
            "ruff>=0.14",
            "pyright>=1.1.400",
            "import-linter>=2.5",
            "moto[s3]>=5.2,<6",
            "gcp-storage-emulator>=2026.7.19",
            "flask>=3",
            "flask-cors>=5",
        ],
    },
    entry_points={"console_scripts": ["v4e=v4e.cli:main", "v4e-shards=data_tools.cli:main"]},
)
