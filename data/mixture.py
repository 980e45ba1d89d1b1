"""Which share of the tokens each source has, at which batch: weights, temperature, curriculum, and what an operator changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from data.config import DataConfig

Shares = tuple[float, ...]
"""Of each source, in the order of their names; the sum is one."""
OPTIONS = ("mixture", "mixture_temperature", "curriculum", "max_epochs")
"""Options of the data that may change when a run goes on."""
Change = tuple[int, dict[str, Any]]
"""The batch from which these `OPTIONS` hold."""


def options_of(config: DataConfig) -> dict[str, Any]:
    """The options that a journal keeps."""
    return {name: _plain(getattr(config, name)) for name in OPTIONS}


def continued(journal: Sequence[Sequence[Any]], config: DataConfig, batch: int) -> list[Change]:
    """The journal of a run that goes on at this batch: what held so far, and what holds from here on if it differs."""
    changes: list[Change] = [(int(first), dict(options)) for first, options in journal if first < batch or first == 0]
    now = options_of(config)
    if not changes:
        return [(0, now)]
    return changes if changes[-1][1] == now else [*changes, (batch, now)]


def as_begun(config: DataConfig, journal: Sequence[Change]) -> DataConfig:
    """The config with the options that held at first."""
    return replace(config, **journal[0][1]) if journal else config


def names(config: DataConfig, journal: Sequence[Change] = ()) -> tuple[str, ...]:
    """Sources that have a weight above zero at any time, sorted."""
    every = [options_of(config), *(options for _, options in journal)]
    phases = [phase for options in every for phase in (options["mixture"], *options["curriculum"].values())]
    return tuple(sorted({name for phase in phases for name, weight in phase.items() if weight > 0}))


@dataclass(frozen=True)
class Schedule:
    """Shares and caps by batch."""

    names: tuple[str, ...]
    changes: tuple[Change, ...]

    @classmethod
    def of(cls, config: DataConfig, journal: Sequence[Change] = ()) -> Self:
        """That of a config, or of a journal whose last change it is."""
        return cls(names(config, journal), tuple(journal) or ((0, options_of(config)),))

    def shares(self, batch: int) -> Shares:
        """Of each source, at this batch."""
        options = self._options(batch)
        weights, since = options["mixture"], -1
        for step, phase in options["curriculum"].items():
            if since < int(step) <= batch:
                weights, since = phase, int(step)
        raw = [weights.get(name, 0.0) for name in self.names]
        if (temperature := options["mixture_temperature"]) != 1:
            raw = [(weight / max(raw)) ** (1 / temperature) for weight in raw]  # of the largest: none overflows
        return tuple(weight / sum(raw) for weight in raw)

    @property
    def most(self) -> Shares:
        """Of each source, the largest at any time; held-out batches are the same at all times."""
        times = {first for first, _ in self.changes}
        times |= {int(step) for _, options in self.changes for step in options["curriculum"]}
        return tuple(max(column) for column in zip(*map(self.shares, times), strict=True))

    def caps(self, batch: int) -> tuple[float, ...]:
        """Times that each source is gone through at most."""
        most = self._options(batch)["max_epochs"]
        return tuple(most.get(name, float("inf")) for name in self.names)

    def _options(self, batch: int) -> dict[str, Any]:
        return [options for first, options in self.changes if first <= batch][-1]


def _plain(value: Any) -> Any:
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value
