"""Every error a user can meet, as one tree.

UnrememberError
├── BadInput        what was asked for cannot be done: all problems together, before a weight is loaded
│   ├── BadRequest      the request file or a command-line value
│   ├── BadCorpus       a corpus file or an example in it
│   ├── BadModel        a model folder, GGUF file, adapter or hub name
│   └── BadFolder       an output folder that is not ours, not writable, or of another run
├── NotApplicable   an attack finds nothing in this model that it could work on
├── Diverged        the loss or the weights stopped being finite; the model that came in is untouched
└── Interrupted     the user stopped the run; it can be resumed

What ends one attack does not end a run: the verdict under it is "not applicable", with the error's text, and the others go on.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnrememberError(Exception):
    """Root of the tree; the command line prints its text and exits with `code`."""

    code = 1


class BadInput(UnrememberError):
    """One or more problems, each with the value given, what is allowed and the next move."""

    code = 2

    def __init__(self, problems: str | Iterable[str]):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class BadRequest(BadInput):
    """A request file or a command-line value that cannot be honoured."""


class BadCorpus(BadInput):
    """A corpus file that cannot be read, or examples that contradict one another."""


class BadModel(BadInput):
    """A model name that leads to nothing loadable, or to something unsafe to load."""


class BadFolder(BadInput):
    """An output folder that is not ours, cannot be written, or belongs to another run."""


class NotApplicable(UnrememberError):
    """An attack that has nothing to work on: no verdict under it, for a reason that the report gives."""

    code = 2


class Diverged(UnrememberError):
    """Training left the finite numbers; `step` and `terms` say where, the caller's weights are untouched."""

    code = 3

    def __init__(self, step: int, terms: dict[str, float]):
        self.step, self.terms = step, terms
        shown = ", ".join(f"{name} = {value:g}" for name, value in terms.items())
        super().__init__(
            f"training diverged at step {step} ({shown}); the model that came in is untouched. "
            "Try a learning rate ten times smaller, or a larger weight on the retain term."
        )


class Interrupted(UnrememberError):
    """Ctrl-C: what was finished is on disk."""

    code = 130


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or the list of all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
