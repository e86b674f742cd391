"""Linear probe: can a label be read off the residual stream with a plane, for entities that the probe never saw?

    minimise  mean cross-entropy(W x̃ + b, z) + λ/2 · ‖W‖²,    x̃ = (x − mean) / sd of the fitting rows,   λ by validation

accuracy = mean over classes of the recall on held-out entities;  selectivity = accuracy − accuracy of the control task, in which
every entity has a random label of its own and all labels are as frequent as before;  chance = 1 / classes.
Alain & Bengio 2016 (arXiv 1610.01644); control tasks: Hewitt & Liang 2019 (arXiv 1909.03368).
Differs: all rows of an entity lie on one side of every split.  Then nobody can guess a random label of somebody new, so the
control shows what split, class sizes and choice of λ give away, not what a probe can memorise (theirs shares words between the
sides).  A probe says that a label can be read there, never that the model reads it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass as plain
from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.train import STRICT

STEPS = 2000  # of the solver, at most
ABOVE = 0.1  # that a probe must lie above chance before unlearning, for shares of that to mean anything


@plain(frozen=True)
class Fitted:
    """weight: (classes, d) and bias: (classes,) for x as it comes; l2: the λ that was chosen."""

    weight: np.ndarray
    bias: np.ndarray
    classes: tuple[Hashable, ...]
    l2: float

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Which class, by number. x: (n, d) -> (n,)"""
        return (x @ self.weight.T + self.bias).argmax(1)


@plain(frozen=True)
class Probed:
    """Balanced accuracy on unseen entities with a 95 % bootstrap interval over entities, and what to hold it against."""

    accuracy: float
    low: float
    high: float
    chance: float
    control: float
    n: int
    l2: tuple[float, ...]

    @property
    def selectivity(self) -> float:
        return self.accuracy - self.control


@plain(frozen=True)
class Decodability:
    """value = (after − chance) / (before − chance) with its 95 % interval: 1 = as readable as before, 0 = not at all."""

    value: float
    low: float
    high: float
    before: float
    after: float
    chance: float
    n: int


def balanced(right: np.ndarray, label: np.ndarray) -> float:
    """Mean over the classes that occur of the share of right ones. (n,) each"""
    return float(np.mean([right[label == z].mean() for z in np.unique(label)]))


def solve(x: np.ndarray, label: np.ndarray, classes: int, l2: float) -> tuple[np.ndarray, np.ndarray]:
    """Minimise mean cross-entropy + l2/2 · ‖W‖². x: (n, d); label: (n,) -> W (classes, d), b (classes,)"""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as absent:
        raise BadRequest("probes need scikit-learn; install unremember[probe]") from absent
    fitted = LogisticRegression(C=1 / (l2 * len(x)) if l2 else np.inf, max_iter=STEPS, tol=1e-5).fit(x, label)
    weight, bias = fitted.coef_, fitted.intercept_
    if classes == 2:  # one plane: half of it for one, half against the other
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias


@dataclass(frozen=True, config=STRICT)
class Probe:
    """l2: the λ to choose from; 0 is allowed where there are more rows than dimensions.

    folds: parts that entities fall into; each part is tested once, and the one after it validates.  draws: of the bootstrap.
    """

    l2: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (
        1e-4,
        1e-3,
        1e-2,
        0.1,
        1.0,
        10.0,
        100.0,
    )
    folds: Annotated[int, Field(ge=3)] = 5
    draws: Annotated[int, Field(ge=1)] = 1000
    seed: Annotated[int, Field(ge=0)] = 0

    def __call__(self, x: np.ndarray, label: Sequence[Hashable], entity: Sequence[Hashable]) -> Probed:
        """Cross-validated over entities. x: (n, d); label, entity: n each, one label an entity."""
        x = np.asarray(x, dtype=float)
        names, z, who, owners = self._checked(x, label, entity, 3)
        one = z[[int(np.flatnonzero(who == i)[0]) for i in range(owners)]]  # (owners,) each one's label
        other = np.random.default_rng([self.seed, 1]).permutation(one)
        right, chosen = self._tested(x, z, who, self._parts(one), len(names))
        blind, _ = self._tested(x, other[who], who, self._parts(other), len(names))
        low, high = np.quantile([balanced(right[i], z[i]) for i in self._resampled(one, who)], [0.025, 0.975])
        control = balanced(blind, other[who])
        return Probed(balanced(right, z), float(low), float(high), 1 / len(names), control, owners, tuple(chosen))

    def fit(self, x: np.ndarray, label: Sequence[Hashable], entity: Sequence[Hashable]) -> Fitted:
        """One probe on all rows; λ is chosen on a part of the entities, then all are fitted."""
        x = np.asarray(x, dtype=float)
        names, z, who, owners = self._checked(x, label, entity, 2)
        one = z[[int(np.flatnonzero(who == i)[0]) for i in range(owners)]]
        weight, bias, l2 = self._chosen(x, z, (self._parts(one) == 0)[who], len(names))
        return Fitted(weight, bias, names, l2)

    def decodability(
        self,
        before: tuple[np.ndarray, np.ndarray],
        after: tuple[np.ndarray, np.ndarray],
        retained: tuple[Sequence[Hashable], Sequence[Hashable]],
        forgotten: tuple[Sequence[Hashable], Sequence[Hashable]],
    ) -> Decodability:
        """What is left to read of the forgotten entities at one site, by probes that each model's retained ones taught.

        before, after: activations (retained rows, forgotten rows) of the two models; retained, forgotten: (labels, entities).
        Raises BadModel where there was hardly anything to read before.
        """
        if shared := sorted({str(i) for i in forgotten[1]} & {str(i) for i in retained[1]}):
            raise BadCorpus(
                f"{', '.join(shared[:3])} is both retained and forgotten, so the probe has seen it; leave it out"
            )
        names = tuple(sorted(set(retained[0]), key=str))
        if strange := sorted({str(z) for z in set(forgotten[0]) - set(names)}):
            raise BadCorpus(
                f"no retained entity has the label {', '.join(strange[:3])}, so no probe can know it; add some"
            )
        z = np.array([names.index(label) for label in forgotten[0]])
        owners = sorted(set(forgotten[1]), key=str)
        who = np.array([owners.index(i) for i in forgotten[1]])
        hits = []
        for kept, gone in (before, after):
            _finite(np.asarray(gone, dtype=float))
            hits.append(self.fit(kept, *retained).predict(np.asarray(gone, dtype=float)) == z)
        chance, (old, new) = 1 / len(names), (balanced(hit, z) for hit in hits)
        if old - chance < ABOVE:
            raise BadModel(
                f"before unlearning a probe tells {old:.2f} of the forgotten entities and chance is {chance:.2f}, too little to "
                "have lost; take another site, or facts that the model knows"
            )
        one = z[[int(np.flatnonzero(who == i)[0]) for i in range(len(owners))]]
        shares = [
            (balanced(hits[1][i], z[i]) - chance) / max(balanced(hits[0][i], z[i]) - chance, ABOVE)
            for i in self._resampled(one, who)
        ]
        low, high = np.quantile(shares, [0.025, 0.975])
        return Decodability((new - chance) / (old - chance), float(low), float(high), old, new, chance, len(owners))

    def _checked(self, x, label, entity, least: int) -> tuple[tuple[Hashable, ...], np.ndarray, np.ndarray, int]:
        """Classes, label and entity numbers.  Everything that is wrong, together."""
        if not (x.ndim == 2 and len(x) == len(label) == len(entity) and len(x)):
            raise BadRequest(
                f"a probe needs a line, a label and an entity a row; given: activations {x.shape}, {len(label)} labels, "
                f"{len(entity)} entities"
            )
        _finite(x)
        names, owners = tuple(sorted(set(label), key=str)), sorted(set(entity), key=str)
        held: dict[Hashable, set[Hashable]] = {}
        for i, z in zip(entity, label, strict=True):
            held.setdefault(i, set()).add(z)
        problems = [
            f"entity {i!r} has {len(zs)} labels ({', '.join(sorted(map(str, zs))[:3])}); a control task gives each entity one, "
            "so probe one attribute at a time"
            for i, zs in held.items()
            if len(zs) > 1
        ]
        if len(names) < 2:
            problems.append(
                f"all {len(x)} rows have the label {names[0]!r}; there is nothing to tell apart, add another class"
            )
        for z in names:
            count = sum(z in zs for zs in held.values())
            if count < least:
                problems.append(
                    f"the label {z!r} has {count} of {len(owners)} entities, so a side of the split would lack it; give it "
                    f"{least} or more, or leave it out"
                )
        if min(self.l2) == 0 and len(x) <= x.shape[1]:
            problems.append(
                f"λ = 0 with {len(x)} rows of {x.shape[1]} dimensions: any labels can be fitted; take 0 out of l2, or add rows"
            )
        if problems:
            raise BadCorpus(problems)
        z = np.array([names.index(label) for label in label])
        places = {i: at for at, i in enumerate(owners)}
        return names, z, np.array([places[i] for i in entity]), len(owners)

    def _parts(self, one: np.ndarray) -> np.ndarray:
        """A part for each entity, classes spread evenly over them. one: (owners,) labels -> (owners,)"""
        rng, part, start = np.random.default_rng(self.seed), np.zeros(len(one), dtype=int), 0
        for z in np.unique(one):
            mine = rng.permutation(np.flatnonzero(one == z))
            part[mine] = (start + np.arange(len(mine))) % min(self.folds, len(mine))
            start += len(mine)
        return part

    def _tested(self, x, z, who, part, classes: int) -> tuple[np.ndarray, list[float]]:
        """For every row whether a probe that saw neither it nor its entity is right, and the λ of each fold."""
        right, chosen = np.zeros(len(z), dtype=bool), []
        count = int(part.max()) + 1
        for fold in range(count):
            test = (part == fold)[who]
            weight, bias, l2 = self._chosen(x[~test], z[~test], (part == (fold + 1) % count)[who][~test], classes)
            right[test] = (x[test] @ weight.T + bias).argmax(1) == z[test]
            chosen.append(l2)
        return right, chosen

    def _chosen(self, x, z, validation: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray, float]:
        """W, b for x as it comes, and the λ that did best on the validation rows; ties go to the larger."""
        if len(missing := set(range(classes)) - set(z[~validation].tolist())):
            raise BadCorpus(
                f"{len(missing)} of {classes} classes have no entity to fit on after the split; add entities"
            )
        mean, sd = _spread(x[~validation])
        best, most = max(self.l2), -1.0
        for l2 in sorted(self.l2, reverse=True) if len(self.l2) > 1 else ():
            weight, bias = solve((x[~validation] - mean) / sd, z[~validation], classes, l2)
            guess = ((x[validation] - mean) / sd @ weight.T + bias).argmax(1)
            if (score := balanced(guess == z[validation], z[validation])) > most:
                best, most = l2, score
        mean, sd = _spread(x)
        weight, bias = solve((x - mean) / sd, z, classes, best)
        return weight / sd, bias - (weight / sd) @ mean, best

    def _resampled(self, one: np.ndarray, who: np.ndarray):
        """Rows of entities drawn with replacement, as many of each class as there are."""
        rng = np.random.default_rng([self.seed, 2])
        rows = [np.flatnonzero(who == i) for i in range(len(one))]
        groups = [np.flatnonzero(one == z) for z in np.unique(one)]
        for _ in range(self.draws):
            yield np.concatenate([rows[i] for mine in groups for i in rng.choice(mine, len(mine))])


def _spread(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each dimension; one that stands still, up to rounding, is not blown up."""
    mean, sd = x.mean(0), x.std(0)
    return mean, np.where(sd > 1e-6 * np.abs(mean), sd, 1.0)


def _finite(x: np.ndarray) -> None:
    if not np.isfinite(x).all():
        line, dim = np.argwhere(~np.isfinite(x))[0]
        raise BadModel(
            f"activation {line}, dimension {dim} is {x[line, dim]}, no finite number; the model is broken, or was read in too "
            "low a precision"
        )
