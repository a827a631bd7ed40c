"""Installs the packages `modeling`, `trainer` and `tools`, and a `some-*` command for each program.

From a clone and editable (`make setup`, or `pip install -e .`): the programs read ds_configs/ and slurm/ beside them.
"""

from setuptools import find_packages, setup

setup(
    name="some-trainer",
    version="0.1.0",
    description="Distributed trainer for Self-Organizing Mixture of Experts language models",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["modeling*", "trainer*", "tools*"]),
    package_data={
        "modeling": ["some/kernels/*"],
        "tools": ["study.yaml", "machines.yaml", "expert_page.css", "reporting/page.*", "reporting/*.js"],
        "trainer": ["experiments/*.yaml", "experiments/published/*.yaml"],
    },
    install_requires=[
        "torch>=2.10",
        "deepspeed>=0.19.2",  # older versions cast the fp32 key stores to bf16
        "accelerate>=1.0",
        "datasets>=3.0",
        "tokenizers>=0.21",
        "tensorboard>=2.16",
        "pyyaml>=6.0",
        "safetensors>=0.5",
        "numpy>=1.26",
        "pyarrow>=15",
        "tqdm>=4.66",
        "psutil>=5.9",
        "rich>=13.7",
    ],
    extras_require={
        "bench": ["transformers>=4.51"],
        "dev": ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.9", "plotly>=6", "playwright>=1.50"],
        "plot": ["matplotlib>=3.8"],
        "report": ["plotly>=6"],
        "umap": ["umap-learn>=0.5.7"],
    },
    entry_points={
        "console_scripts": [
            "some-train = trainer.run:main",
            "some-bench = tools.bench:main",
            "some-reproduce = tools.reproduce:main",
            "some-study = tools.study:main",
            "some-padding = tools.padding:main",
            "some-plan = tools.plan:main",
            "some-watch = tools.watch:main",
            "some-inspect = tools.inspect_experts:main",
            "some-balance = tools.balance:main",
            "some-chaos = tools.chaos:main",
            "some-grid = tools.grid:main",
            "some-report = tools.report:main",
        ]
    },
)
