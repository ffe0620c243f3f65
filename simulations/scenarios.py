"""What happens to whom in a simulation: who is away, late, crashes, or attacks.

Each is decided by the study's seed, the site's name and the round alone, so that a scenario is
the same on every runtime, and goes on the same after a crash.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from fedward.core.canonical import digest
from fedward.core.errors import ConfigError, some_of
from fedward.core.simulated import Dropout, Malicious, SimulationSection, Stragglers
from fedward.core.study import Study
from fedward.strategies.strategy import Vector
from fedward.tasks.task import Examples

_CHAIN = 256


@dataclass(frozen=True)
class Scenario:
    """A study's `[simulation]`, with names.

    Attributes:
        seed: Of the study.
        settings: What is asked for.
        malicious: The sites that attack.
        tries: How often the round was void before.
    """

    seed: int
    settings: SimulationSection
    malicious: frozenset[str] = field(default_factory=frozenset)
    tries: int = 0

    @property
    def quiet(self) -> bool:
        """Whether nothing ever happens."""
        return not self.settings.happens

    @property
    def has_trigger(self) -> bool:
        """Whether somebody plants a backdoor."""
        attack = self.settings.malicious
        return attack is not None and attack.attack == "backdoor"

    def again(self, tries: int) -> "Scenario":
        """What happens when a void round was tried so many times: chances are drawn anew."""
        return replace(self, tries=tries)

    def dropped(self, site: str, round_number: int) -> bool:
        """Whether a site cannot be reached in a round."""
        match self.settings.dropout:
            case None:
                return False
            case Dropout(kind="independent", rate=rate):
                return self._chance("dropout", site, round_number) < rate
            case Dropout() as dropout:
                # A try takes the time of a round, in which a spell may end.
                return _away(self.seed, dropout, site, round_number + self.tries)

    def crashes(self, site: str, round_number: int) -> bool:
        """Whether a site crashes after it paid for a round, and before it answers."""
        crash = self.settings.crash
        return crash > 0 and self._chance("crash", site, round_number) < crash

    def seconds(self, site: str, round_number: int) -> float:
        """Virtual seconds that a site takes; 0 where nobody is asked to be slow."""
        stragglers = self.settings.stragglers
        if stragglers is None:
            return 0.0
        return _quantile(stragglers, self._chance("latency", site, round_number))

    def outgoing(self, site: str, update: Vector) -> Vector:
        """What an attacker that acts alone sends in place of its update."""
        attack = self.settings.malicious
        if attack is None or site not in self.malicious or attack.factor == 1:
            return update
        return np.float32(attack.factor) * update

    def _chance(self, what: str, site: str, round_number: int) -> float:
        tried = f"/{self.tries}" if self.tries else ""
        return _chance(self.seed, what + tried, site, round_number)

    def poison(self, site: str, training: Examples) -> Examples:
        """A site's training data, as an attacker would have them."""
        attack = self.settings.malicious
        if attack is None or site not in self.malicious or not len(training):
            return training
        if attack.attack == "label-flip":
            # Tolpygo et al.: every class for its mirror image.
            top = training.labels.max()
            return replace(
                training, labels=(max(top, 1) - training.labels).astype(training.labels.dtype)
            )
        if attack.attack == "backdoor":
            return _with_trigger(training, attack, self._generator("backdoor", site))
        return training

    def trigger(self, examples: Examples) -> Examples:
        """All rows with the backdoor's mark, to see whether it works."""
        attack = self.settings.malicious
        if attack is None:
            return examples
        return _with_trigger(examples, replace_share(attack), np.random.default_rng(0), label=False)

    def _generator(self, what: str, site: str) -> np.random.Generator:
        return np.random.default_rng(int(digest(f"{self.seed}/{what}/{site}".encode()), 16))


def make_scenario(study: Study, sites: Sequence[str]) -> Scenario:
    """The study's scenario over these sites.

    Raises:
        ConfigError: It names sites that there are not.
    """
    attack = study.simulation.malicious
    if attack is None:
        return Scenario(study.study.seed, study.simulation)
    if isinstance(attack.sites, int):
        rng = np.random.default_rng([study.study.seed, 0xBAD])
        if attack.sites >= len(sites):
            raise _wrong(f"sites = {attack.sites} leaves no honest one of {len(sites)}")
        chosen = [sites[i] for i in rng.choice(len(sites), attack.sites, replace=False)]
    else:
        chosen = list(attack.sites)
        unknown = sorted(set(chosen) - set(sites))
        if unknown:
            raise _wrong(f"names no site {some_of(unknown)}; sites: {some_of(sites)}")
        if len(set(chosen)) == len(sites):
            raise _wrong("leaves no honest site")
    return Scenario(study.study.seed, study.simulation, frozenset(chosen))


def replace_share(attack: Malicious) -> Malicious:
    """The same attack on every row."""
    return attack.model_copy(update={"share": 1.0})


@lru_cache(maxsize=65536)
def _away(seed: int, dropout: Dropout, site: str, round_number: int) -> bool:
    """Gilbert's chain: away for `mean_length` rounds on average, `rate` of them in all."""
    draw = _chance(seed, "dropout", site, round_number)
    if round_number % _CHAIN == 0:
        # Begun anew now and then, so that late rounds need not know all those before.
        return draw < dropout.rate
    if _away(seed, dropout, site, round_number - 1):
        return draw >= 1 / dropout.mean_length
    return draw < dropout.rate / (dropout.mean_length * (1 - dropout.rate))


def _chance(seed: int, what: str, site: str, round_number: int) -> float:
    """A number in [0, 1) that depends on nothing else."""
    text = f"{seed}/{what}/{site}/{round_number}"
    return int(digest(text.encode())[:13], 16) / 16**13


def _quantile(stragglers: Stragglers, chance: float) -> float:
    inside = min(max(chance, 1e-12), 1 - 1e-12)
    match stragglers.distribution:
        case "lognormal":
            return stragglers.median * math.exp(stragglers.spread * _normal_quantile(inside))
        case "exponential":
            return -stragglers.median * math.log1p(-inside) / math.log(2)
        case "pareto":
            return stragglers.median * math.pow(2 * (1 - inside), -stragglers.spread / 2)


def _normal_quantile(chance: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(chance)


def _with_trigger(
    examples: Examples, attack: Malicious, rng: np.random.Generator, *, label: bool = True
) -> Examples:
    """Mark a share of rows and call them class 1 (Gu, Dolan-Gavitt and Garg 2017)."""
    features = examples.features.reshape(len(examples), -1).copy()
    if attack.feature >= features.shape[1]:
        raise _wrong(f"feature = {attack.feature}: there are {features.shape[1]}")
    marked = rng.random(len(examples)) < attack.share
    features[marked, attack.feature] = attack.value
    labels = examples.labels.copy()
    if label:
        labels[marked] = 1
    return Examples(features.reshape(examples.features.shape), labels, examples.units)


def _wrong(problem: str) -> ConfigError:
    return ConfigError(problem, file="study", key="[simulation] malicious")
