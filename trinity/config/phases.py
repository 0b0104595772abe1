"""The phases of a run's data, each with the values that it inherits from the phase before."""

from typing import NamedTuple

from trinity.config.run import DataConfig, LengthBiasConfig


class ResolvedPhase(NamedTuple):
    """One phase with all of its values. mixture: the sources that are read, with weights that sum to 1."""

    tokens: int
    mixture: dict[str, float]
    sequence_length: int
    packing: str
    rsdb_size: int
    length_bias: LengthBiasConfig


def resolved_phases(data: DataConfig) -> list[ResolvedPhase]:
    """Phase 0, which starts the run, and the phases of data.phases."""
    mixture = data.mixture or dict.fromkeys(data.train, 1.0)
    phases = [
        ResolvedPhase(0, _normalized(mixture), data.sequence_length, data.packing, data.rsdb_size, data.length_bias)
    ]
    for phase in data.phases:
        last = phases[-1]
        phases.append(
            ResolvedPhase(
                phase.tokens,
                _normalized(phase.mixture) or last.mixture,
                phase.sequence_length or last.sequence_length,
                phase.packing or last.packing,
                phase.rsdb_size or last.rsdb_size,
                phase.length_bias or last.length_bias,
            )
        )
    return phases


def _normalized(mixture: dict[str, float]) -> dict[str, float]:
    total = sum(mixture.values())
    return {name: weight / total for name, weight in mixture.items() if weight}
