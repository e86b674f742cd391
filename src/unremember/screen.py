"""The screen: live progress on a terminal, plain lines elsewhere.  Nothing heavy is imported before work begins."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager

from unremember.errors import BadRequest


def _there(device: str) -> None:
    """BadRequest for a device that this machine does not have."""
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadRequest(
            f"--device {device!r}: {str(error).splitlines()[0]}; use cpu, or cuda where there is a GPU"
        ) from None


class at_work:
    """Joins the team, shows live progress on a terminal (plain lines elsewhere), and cleans up."""

    def __init__(self, device: str):
        self.device = device

    def __enter__(self) -> at_work:
        _there(self.device)
        warnings.filterwarnings("ignore", module="torch|transformers|huggingface_hub")
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column
        from transformers.utils import logging

        from unremember import team
        from unremember.bench import Bench
        from unremember.machine import keep_memory

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        keep_memory()
        team.join(self.device)
        self.quiet = team.rank() > 0
        self.live = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=10, table_column=Column(min_width=10)),
            TextColumn("{task.completed}/{task.total}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[terms]}", style="dim", table_column=Column(ratio=1, no_wrap=True)),
            expand=True,
            console=Console(highlight=False),
            disable=self.quiet,
        )
        self.task = None
        self.bench = Bench(device=self.device, say=self.say)
        self.live.start()
        return self

    def __exit__(self, *error) -> None:
        from unremember import team

        self.finish()
        self.live.stop()
        team.leave()

    @contextmanager
    def aside(self) -> Generator[None]:
        """While another process of ours has the screen."""
        self.finish()
        self.live.stop()
        try:
            yield
        finally:
            for task in self.live.task_ids:  # what was done before has been shown
                self.live.remove_task(task)
            self.live.start()

    def title(self, text: str) -> None:
        """A new stage begins."""
        self.finish()
        self.text = text
        if not self.live.console.is_terminal and not self.quiet:
            self.live.console.print(f"▸ {text}", markup=False)
        self.task = self.live.add_task(text, total=None, terms="")

    def say(self, stage: str, done: int, total: int, terms: dict[str, float]) -> None:
        """One more unit of the present stage is done; work inside a unit shows in the terms column alone."""
        if self.task is None:
            return
        shown = "  ".join(f"{name} {value:.3g}" for name, value in terms.items())
        if stage in ("read", "speak", "contrast"):
            self.live.update(self.task, terms=f"{stage} {done}/{total}")
        else:
            self.live.update(self.task, completed=done, total=total, terms=shown or stage)

    def finish(self) -> None:
        if self.task is not None:
            task = next(t for t in self.live.tasks if t.id == self.task)
            done = task.completed or 1  # a stage may end before its cap
            self.live.update(self.task, total=done, completed=done)
            self.task = None
