# SPDX-License-Identifier: Apache-2.0
"""`RunStore`: a folder of runs by their hash; each is done once, and one that was interrupted goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..storage import atomic_write
from ..training import RunSummary, TrainingFailure, evaluate_run, run
from ..training.checkpoint import list_checkpoints
from ..training.run import RUN_NAME
from .cascades import RESULT_NAME, train_cascade
from .run_spec import RunSpec

__all__ = ["RunStore"]

_FAILED = "failed.json"


class RunStore:
    """Finished runs below a folder.

    Attributes:
        folder: Holds ``runs/<hash>/``, each the `output_dir` of a run without its checkpoints.
    """

    def __init__(self, folder: str | Path) -> None:
        """Name the folder; it is made with the first run."""
        self.folder = Path(folder)

    def path(self, spec: RunSpec) -> Path:
        """Where a run is, or will be."""
        return self.folder / "runs" / spec.id

    def is_done(self, spec: RunSpec) -> bool:
        """Whether there is nothing left to do for a run: it is finished, or failed for good."""
        result = RUN_NAME if spec.cascade is None else RESULT_NAME
        return (self.path(spec) / result).is_file() or self.failure(spec) is not None

    def failure(self, spec: RunSpec) -> str | None:
        """Why a run could not be finished; None if it could, or has not been tried."""
        if spec.found is not None and (reason := self.failure(spec.found)) is not None:
            return reason
        path = self.path(spec) / _FAILED
        return str(json.loads(path.read_text("utf-8"))["error"]) if path.is_file() else None

    def ensure(self, spec: RunSpec) -> None:
        """Run what is not done yet, from its newest checkpoint if there is one.

        A run that cannot go on (a loss that is not finite, an empty mask, collapsed codes) counts as done, with its
        reason in the folder: it would fail again. Delete the folder to try anew.

        Raises:
            ValueError: If it cannot be started, such as for files that are not there.
            Interrupted: After Ctrl-C, once a checkpoint is written.
        """
        if spec.found is not None:
            self.ensure(spec.found)
        if not self.is_done(spec):
            density = None if spec.found is None else self.summary(spec.found).density
            arguments = spec.to_arguments(self.path(spec), density)
            try:
                if spec.cascade is None:
                    run(arguments)
                else:
                    train_cascade(arguments, spec.cascade)
            except TrainingFailure as error:
                with atomic_write(self.path(spec) / _FAILED) as file:
                    file.write(json.dumps({"error": str(error)}).encode())
        for folder in {path.parent for path in self.path(spec).rglob("checkpoint-*")}:
            for checkpoint in list_checkpoints(folder):
                shutil.rmtree(checkpoint)

    def summary(self, spec: RunSpec) -> RunSummary:
        """What came of a finished run."""
        return RunSummary.load(self.path(spec))

    def low_shot(self, spec: RunSpec, fractions: Sequence[float], *, base: bool = False) -> dict[float, float]:
        """Accuracy of linear probes on fractions of the labels, each the mean over three draws of them.

        Args:
            spec: A finished run.
            fractions: Of the labels.
            base: Of the frozen base in the place of the run.
        """
        path = self.path(spec) / f"low_shot{'_base' if base else ''}.json"
        known = {float(key): value for key, value in json.loads(path.read_text())} if path.is_file() else {}
        if missing := [fraction for fraction in fractions if fraction not in known]:
            for report in evaluate_run(self.path(spec), base=base, backbone=spec.backbone, low_shot=missing, seeds=3):
                known[float(report.settings["label_fraction"])] = report.value
            with atomic_write(path) as file:
                file.write(json.dumps(sorted(known.items())).encode())
        return {fraction: known[fraction] for fraction in fractions}

    def size(self, spec: RunSpec) -> int:
        """Bytes of the file that a run saved: the adapter, or all weights."""
        files = [file for file in self.path(spec).glob("*.safetensors") if file.is_file()]
        return max(file.stat().st_size for file in files)
