# SPDX-License-Identifier: Apache-2.0
"""Fetch PEFT's own tests and run them on mask adapters.

They come with the source distribution of the installed PEFT; nothing of them is kept in this repository.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from . import stand_ins

__all__ = ["FILES", "download", "run"]

HERE = Path(__file__).resolve().parent
FILES = (
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
    "test_vision_models.py",
)


def download(folder: Path) -> Path:
    """The source distribution of the installed PEFT."""
    version = importlib.metadata.version("peft")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=peft"]
    subprocess.run([*command, "-d", str(folder), f"peft=={version}"], check=True)
    return next(folder.glob("peft-*.tar.gz"))


def extract(sdist: Path, folder: Path) -> Path:
    """The tests of a source distribution as the package `peft_tests` in `folder`."""
    target = folder / "peft_tests"
    target.mkdir()
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            path = Path(member.name)
            content = archive.extractfile(member) if path.suffix == ".py" and path.parts[1:-1] == ("tests",) else None
            if content is not None:
                (target / path.name).write_bytes(content.read())
    if not any(target.iterdir()):
        raise SystemExit(f"{sdist} holds no tests.")
    (target / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\n")
    return target


def run(files: list[str], sdist: Path | None, arguments: list[str]) -> int:
    """Run the given test files on mask adapters.

    Args:
        files: Names of PEFT's test files.
        sdist: A source distribution of PEFT; None downloads the installed version's.
        arguments: Arguments for pytest.

    Returns:
        Pytest's exit code.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        extract(sdist or download(folder), folder)
        for model in stand_ins.MODELS if set(files) - {"test_custom_models.py"} else ():
            stand_ins.build(model, folder / "models")
        paths = [str(Path("peft_tests") / file) for file in files]
        environ = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
        environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "pytest", "-p", "plugin", "-c", "pytest.ini", "-q", "-W", "ignore"]
        return subprocess.run([*command, *paths, *arguments], cwd=folder, env=environ, check=False).returncode
