"""The package: every folder of the house is an import name of its own."""

import re
from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = ["configs", "launch", "trainer", "data", "model", "sharding"]
VERSION = re.search(r'__version__ = "(.+)"', Path(__file__).with_name("launch").joinpath("__init__.py").read_text())
assert VERSION

setup(
    name="drover",
    version=VERSION[1],
    description="Trains sparse, natively multimodal mixture-of-experts models, from one config file.",
    license="Apache-2.0",
    license_files=["LICENSE"],
    package_data={"data": ["document.schema.json"]},
    packages=find_packages(include=[pattern for folder in FOLDERS for pattern in (folder, f"{folder}.*")]),
    entry_points={"console_scripts": ["drover = launch.cli:main"]},
    python_requires=">=3.11",
    # Lower bounds are the oldest versions that the tests have run with; requirements.lock pins what they run with now.
    install_requires=[
        "absl-py>=2.5,<3",
        "array-record>=0.8.3,<0.9",
        "av>=18.1,<19",
        "chex>=0.1.92,<0.2",
        "flax>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "jax>=0.10.2,<0.12",
        "ml-collections>=1.1,<2",
        "ml-dtypes>=0.6,<0.7",
        "msgpack>=1.1,<2",
        "numpy>=2.4,<3",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pillow>=13,<14",
        "pyarrow>=26,<27",
        "qwix>=0.1.8,<0.2",
        "rich>=15,<16",
        "soundfile>=0.14,<0.15",
        "soxr>=1.1,<2",
        "tensorboardX>=2.6.5,<3",
        "tensorstore>=0.1.86,<0.2",
        "tokenizers>=0.23.3,<0.24",
    ],
    extras_require={
        "gpu": ["jax[cuda13]>=0.10.2,<0.12", "tokamax>=0.0.12,<0.1"],
        "tpu": ["jax[tpu]>=0.10.2,<0.12"],
        "dev": [
            "autograd>=1.9,<2",
            "hypothesis>=6.170,<7",
            "jinja2>=3.1.6,<4",
            "jsonschema>=4.26,<5",
            "pyright>=1.1.414,<2",
            "pytest>=9.2,<10",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.17.5,<0.18",
            "safetensors>=0.8,<0.9",
            "setuptools>=70.1",
        ],
    },
)
