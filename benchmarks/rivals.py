"""Samplers of other tuners, written from their published descriptions, to be compared with ours on recorded sweeps.

`lfbo` is the pattern search of Helion that asks a forest of trees which neighbours to try ("LFBO Pattern Search", with
its quick profile). `vndx` and `tabu_wolf` are the two optimisers that Kernel Tuner ships from the paper "Automated
Algorithm Design For Auto-Tuning Optimizers" (`gen_hybrid_vndx`, `gen_adaptive_tabu_greywolf`).

Each is a generator: it yields the index of a point, and is sent the point's time, infinite where the point fails.
"""

import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from hsa_compile.autotune.samplers.point import PointTable
from hsa_compile.autotune.sweeps import RecordedSweep

Search = Generator[int, float, None]

_MAX_IDLE = 200  # after so many repeats in a row a search begins anew, since a repeat costs nothing
_BUDGET = 100  # evaluations by which `tabu_wolf` has cooled


def replay(
    make: "Rival", sweep: RecordedSweep, space: "Space", first: Sequence[int], seed: int, evaluations: int
) -> list[float]:
    """Runs one search on a sweep; returns the least time after each evaluation, as `sweeps.Replay.run` does.

    A point that was tried before is answered from memory, as Kernel Tuner does, and costs nothing.
    """
    rng = random.Random(seed)
    search = make(space, list(first), rng)
    evaluations = min(evaluations, len(space))
    known: dict[int, float] = {}
    best: list[float] = []
    index, idle = next(search), 0
    while True:
        idle += 1
        if index not in known:
            known[index] = sweep.times[index] or math.inf
            best.append(min(known.values()))
            idle = 0
        if len(best) == evaluations or best[-1] <= sweep.optimum:
            return best + best[-1:] * (evaluations - len(best))
        if idle == _MAX_IDLE:  # it goes round in circles
            search = make(space, [], rng)
            index = next(search)
        else:
            index = search.send(known[index])


class Space:
    """The points of a sweep with the neighbourhoods that these searches walk in."""

    def __init__(self, table: PointTable) -> None:
        self.codes: NDArray[np.int64] = table.codes
        self.features = table.features
        self._index = {tuple(row): index for index, row in enumerate(table.codes.tolist())}

    def __len__(self) -> int:
        return len(self.codes)

    def find(self, codes: Sequence[int]) -> int | None:
        """The index of the point with these codes; None if it is not valid."""
        return self._index.get(tuple(codes))

    def adjacent(self, codes: Sequence[int]) -> list[int]:
        """Points of which no parameter is more than one step away."""
        apart = np.abs(self.codes - np.array(codes))
        return self._others(apart.max(axis=1) == 1)

    def one_step(self, codes: Sequence[int]) -> list[int]:
        """Points of which one parameter is one step away."""
        return self._others(np.abs(self.codes - np.array(codes)).sum(axis=1) == 1)

    def hamming(self, codes: Sequence[int]) -> list[int]:
        """Points of which one parameter has another value."""
        return self._others((self.codes != np.array(codes)).sum(axis=1) == 1)

    @staticmethod
    def _others(chosen: NDArray[np.bool_]) -> list[int]:
        found: list[int] = np.flatnonzero(chosen).tolist()
        return found


Rival = Callable[[Space, list[int], random.Random], Search]


def vndx(space: Space, first: list[int], rng: random.Random) -> Search:
    """Walks between neighbourhoods; the nearest tried points say which of eight candidates looks best.

    Candidates are neighbours, a child of two of the best five, and random points. A worse one is accepted with a
    probability that falls with time; a neighbourhood that gave an accepted one is used more.
    """
    neighbourhoods = (space.one_step, space.adjacent, space.hamming)
    weights = [1.0] * len(neighbourhoods)
    history: list[tuple[int, float]] = []
    tabu: deque[int] = deque(maxlen=300)
    current = first[0] if first else rng.randrange(len(space))
    time = yield current
    history.append((current, time))
    tabu.append(current)
    temperature, no_gain = 1.0, 0
    while True:
        kind = rng.choices(range(len(weights)), weights)[0]
        near = neighbourhoods[kind](space.codes[current])
        pool = rng.sample(near, min(len(near), 4))
        elite = sorted(history, key=lambda one: one[1])[:5]
        if len(elite) >= 2:
            (one, _), (other, _) = rng.sample(elite, 2)
            child = space.find([rng.choice(pair) for pair in zip(*space.codes[[one, other]].tolist(), strict=True)])
            pool.append(rng.randrange(len(space)) if child is None else child)
        pool += [rng.randrange(len(space)) for _ in range(8 - len(pool))]
        guesses = {each: _guess(space, each, history) + (1e3 if each in tabu else 0.0) for each in pool}
        chosen = min(guesses, key=lambda each: guesses[each])
        found = yield chosen
        history.append((chosen, found))
        if found < time or rng.random() < math.exp(-(found - time) / max(temperature, 1e-8)):
            tabu.append(chosen)
            current, time = chosen, found
            weights[kind] *= 1.1
            no_gain = 0
        else:
            weights[kind] *= 0.9
            no_gain += 1
        temperature *= 0.995
        if no_gain >= 100:
            current = rng.randrange(len(space))
            time = yield current
            history.append((current, time))
            tabu = deque([current], maxlen=300)
            temperature, no_gain = 1.0, 0


def _guess(space: Space, index: int, history: list[tuple[int, float]]) -> float:
    """The mean time of the five tried points that differ in the fewest parameters; a failure counts as very slow."""
    tried = space.codes[[each for each, _ in history]]
    apart = (tried != space.codes[index]).sum(axis=1)
    nearest = np.argsort(apart, kind="stable")[:5]
    return float(np.mean([min(history[place][1], 1e20) for place in nearest]))


def tabu_wolf(space: Space, first: list[int], rng: random.Random) -> Search:
    """A pack of eight follows its best three; each other wolf mixes its values with theirs, and may be shaken.

    The pack cools with the share of a budget that is spent, here `_BUDGET`.
    """
    size, limit = 8, 80
    tabu: deque[int] = deque(maxlen=3 * size)
    pack: list[tuple[float, int]] = []
    for index in [*first, *rng.sample(range(len(space)), min(size, len(space)))][:size]:
        pack.append(((yield index), index))
        tabu.append(index)
    best, stagnant, tried = min(pack)[0], 0, len(pack)
    while True:
        pack.sort()
        leaders = [index for _, index in pack[:3]]
        done = min(1.0, tried / _BUDGET)
        temperature = max(1e-4, math.exp(-5 * done))
        temperature += 0.2 if stagnant and stagnant % (limit // 2) == 0 else 0.0
        shaking = min(0.5, 0.2 * (1 + stagnant / limit))
        for place, (time, index) in enumerate(pack):
            if index in leaders:
                continue
            child = _mixed(space, [*leaders, index], rng)
            if rng.random() < shaking:
                child = _shaken(space, child, done, rng)
            repaired = _repaired(space, child, rng)
            if repaired in tabu and (near := space.hamming(space.codes[repaired])):
                repaired = rng.choice(near)
            found = yield repaired
            tried += 1
            tabu.append(repaired)
            if found <= time or rng.random() < math.exp(-(found - time) / temperature):
                pack[place] = (found, repaired)
        least = min(pack)[0]
        best, stagnant = (least, 0) if least < best else (best, stagnant + 1)
        if stagnant >= limit or len(set(pack)) <= 3:
            pack.sort()
            for place in range(size - math.ceil(0.3 * size), len(pack)):
                index = rng.randrange(len(space))
                pack[place] = ((yield index), index)
                tried += 1
            stagnant = 0


def _mixed(space: Space, parents: list[int], rng: random.Random) -> list[int]:
    return [rng.choice(column) for column in zip(*space.codes[parents].tolist(), strict=True)]


def _shaken(space: Space, codes: list[int], done: float, rng: random.Random) -> list[int]:
    """One value taken from any point, or a step to a neighbour: a wide one in the first half of the search."""
    if rng.random() < 0.15:
        place = rng.randrange(len(codes))
        codes[place] = int(space.codes[rng.randrange(len(space)), place])
        return codes
    near = space.adjacent(codes) if done < 0.5 else space.one_step(codes)
    found: list[int] = space.codes[rng.choice(near)].tolist() if near else codes
    return found


def _repaired(space: Space, codes: list[int], rng: random.Random) -> int:
    index = space.find(codes)
    if index is not None:
        return index
    for near in (space.adjacent(codes), space.hamming(codes), space.one_step(codes)):
        if near:
            return near[0]
    return rng.randrange(len(space))


def lfbo(space: Space, first: list[int], rng: random.Random) -> Search:
    """Thirty random points, then two walks from the best two: a forest that tells the best tenth from the rest picks a
    tenth of three hundred neighbours, unlike each other; five rounds, one of which may bring nothing.

    When all walks have ended, ten more random points are tried, and the walks begin anew from the best so far.
    """
    times: dict[int, float] = {}
    for index in itertools.chain(first, rng.sample(range(len(space)), min(30, len(space)))):
        if index not in times:
            times[index] = yield index
    while len(times) < len(space):
        walks = [(index, 1) for index in sorted(times, key=lambda each: times[each])[:2]]
        for _ in range(5):
            forest = _forest(space, times)
            left: list[tuple[int, int]] = []
            for current, patience in walks:
                near = [each for each in dict.fromkeys(_perturbed(space, current, rng)) if each not in times]
                picked = _picked(space, forest, near, (len(near) + 1) // 10, rng)
                for index in picked:
                    times[index] = yield index
                best = min([current, *picked], key=lambda each: times[each])
                patience -= not times[best] < times[current] * 0.999
                if picked and patience >= 0:
                    left.append((best, patience))
            walks = left
        untried = [index for index in range(len(space)) if index not in times]
        for index in rng.sample(untried, min(10, len(untried))):
            times[index] = yield index


def _perturbed(space: Space, current: int, rng: random.Random) -> Iterator[int]:
    """Three hundred tries to move one parameter by up to two steps and at most two others by one; valid ones stay."""
    base = space.codes[current].tolist()
    tops = space.codes.max(axis=0).tolist()
    for _ in range(300):
        codes = list(base)
        order = rng.sample(range(len(codes)), len(codes))
        for place, reach in zip(order, (2, *[1] * rng.randint(0, 2)), strict=False):
            steps = [value for value in range(codes[place] - reach, codes[place] + reach + 1) if value != codes[place]]
            codes[place] = rng.choice([value for value in steps if 0 <= value <= tops[place]])
        if (index := space.find(codes)) is not None:
            yield index


def _forest(space: Space, times: dict[int, float]):  # type: ignore[no-untyped-def] # scikit-learn has no types
    """A classifier of the best tenth, in which a point counts the more the faster it is; None without two classes."""
    from sklearn.ensemble import RandomForestClassifier  # only this rival needs it

    tried, values = list(times), np.array(list(times.values()))
    finite = np.isfinite(values)
    if not finite.any():
        return None
    bound = float(np.quantile(values[finite], 0.1))
    good = values <= bound
    if good.all():
        return None
    gain = np.maximum(1e-5, bound - np.where(good, values, bound))
    weights = np.where(good, gain / gain[good].mean(), 1.0)
    forest = RandomForestClassifier(n_estimators=100, criterion="log_loss", random_state=42, n_jobs=1)
    return forest.fit(space.features[tried], good, sample_weight=weights)


def _picked(space: Space, forest, near: list[int], count: int, rng: random.Random) -> list[int]:  # type: ignore[no-untyped-def]
    """The most probably good ones, less their mean likeness to those picked before: the trees that put both alike."""
    if not near or count < 1:
        return []
    if forest is None:
        return rng.sample(near, count)
    chances = forest.predict_proba(space.features[near])[:, 1]
    leaves = forest.apply(space.features[near])
    likeness = np.zeros(len(near))
    picked: list[int] = []
    for number in range(count):
        score = chances - likeness / max(number, 1)
        score[picked] = -np.inf
        picked.append(int(score.argmax()))
        likeness += (leaves == leaves[picked[-1]]).mean(axis=1)
    return [near[place] for place in picked]


RIVALS: dict[str, Rival] = {"lfbo": lfbo, "vndx": vndx, "tabu_wolf": tabu_wolf}
