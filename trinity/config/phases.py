"""The data of a run by phases: each with everything it inherits from the one before."""

from typing import NamedTuple

from trinity.config.run import DataConfig, LengthBiasConfig


class WholePhase(NamedTuple):
    """One phase with every value. mixture holds the sources that are read, with weights that sum to 1."""

    tokens: int
    mixture: dict[str, float]
    sequence_length: int
    packing: str
    rsdb_size: int
    length_bias: LengthBiasConfig


def whole_phases(data: DataConfig) -> list[WholePhase]:
    """Phase 0, which begins the run, and those of data.phases."""
    mixture = data.mixture or dict.fromkeys(data.train, 1.0)
    phases = [WholePhase(0, _shares(mixture), data.sequence_length, data.packing, data.rsdb_size, data.length_bias)]
    for phase in data.phases:
        last = phases[-1]
        phases.append(
            WholePhase(
                phase.tokens,
                _shares(phase.mixture) or last.mixture,
                phase.sequence_length or last.sequence_length,
                phase.packing or last.packing,
                phase.rsdb_size or last.rsdb_size,
                phase.length_bias or last.length_bias,
            )
        )
    return phases


def _shares(mixture: dict[str, float]) -> dict[str, float]:
    total = sum(mixture.values())
    return {name: weight / total for name, weight in mixture.items() if weight}
