# SPDX-License-Identifier: Apache-2.0
"""`run_many`: one run per task in a process, each as it would be alone; what is done is not done again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from accelerate import PartialState

from .guards import TrainingFailure
from .run import RunSummary, finished_run, run
from .shared import share
from .train_arguments import TrainArguments

__all__ = ["EXPECTED", "check_tasks", "run_many"]


#: What comes with its remedy; other errors are bugs, and end everything.
EXPECTED = (ValueError, OSError, RuntimeError, ImportError)


def run_many(tasks: Mapping[str, TrainArguments]) -> Iterator[tuple[str, RunSummary | Exception]]:
    """Train the tasks in turn and give what came of each, as soon as it is there.

    A task that is finished is not trained again, one that was interrupted goes on from its checkpoint, and one that
    fails, or whose data cannot be read, does not keep the others from their turn. Importing is paid once; so are, for
    tasks that follow one another with `cache_images` on the same images, decoding these and the frozen base's features
    of them.

    Args:
        tasks: Arguments by name, each with an `output_dir` of its own. Precision and device must be those of the
            first, since accelerate keeps them for the whole process.

    Yields:
        The name, and the summary of the run or the error that ended it.

    Raises:
        ValueError: If two tasks share a folder, or differ in precision or device: nothing is trained then.
        RuntimeError: With several processes, if a task fails otherwise than by its training, which all see alike: the
            others would wait for the process that failed. The message names the task.
        Interrupted: After Ctrl-C, once a checkpoint is written.
    """
    check_tasks(tasks)
    with share():
        for name, arguments in tasks.items():
            going_on = replace(arguments, resume=True)
            try:
                yield name, finished_run(going_on) or run(going_on)
            except TrainingFailure as failure:
                yield name, failure
            except EXPECTED as error:
                if PartialState().num_processes > 1:
                    raise RuntimeError(f"{name}: {error}") from error
                yield name, error


def check_tasks(tasks: Mapping[str, TrainArguments]) -> None:
    """Refuse tasks that cannot be trained by one process, one after the other.

    Raises:
        ValueError: As [`run_many`].
    """
    folders: dict[str, str] = {}
    first = next(iter(tasks.values()), None)
    for name, arguments in tasks.items():
        if (other := folders.setdefault(str(arguments.output_dir), name)) != name:
            raise ValueError(f"Tasks {other!r} and {name!r} have the same output_dir: {arguments.output_dir}.")
        for field in ("mixed_precision", "cpu"):
            if getattr(arguments, field) != getattr(first, field):
                raise ValueError(
                    f"Task {name!r} has another {field} than the first task: accelerate keeps one for the whole "
                    "process. Put such tasks into a file of their own."
                )
