"""Overlap of waiting jobs, and whether sharing among replicas pays."""

import pytest
import torch

from trinity.optim.muon_comm import Job, overlap, sharing_pays


@pytest.mark.parametrize(
    ("max_in_flight", "order"),
    [
        (1, "a0 a1 a2 b0 c0 c1 d0 d1"),
        (2, "a0 b0 c0 a1 c1 d0 a2 d1"),
        (3, "a0 b0 c0 d0 a1 c1 d1 a2"),
        (9, "a0 b0 c0 d0 a1 c1 d1 a2"),
    ],
)
def test_the_next_job_starts_while_one_waits(max_in_flight: int, order: str) -> None:
    """a waits twice, b never, c and d once."""
    log: list[str] = []

    def job(name: str, waits: int) -> Job:
        log.append(f"{name}0")
        for part in range(waits):
            yield
            log.append(f"{name}{part + 1}")

    overlap((job(name, waits) for name, waits in (("a", 2), ("b", 0), ("c", 1), ("d", 1))), max_in_flight)
    assert " ".join(log) == order


def test_a_job_starts_only_when_there_is_room() -> None:
    """Its memory is allocated at its start, and at most `max_in_flight` jobs are alive."""
    alive, peak = 0, 0

    def job() -> Job:
        nonlocal alive, peak
        alive += 1
        peak = max(peak, alive)
        yield
        yield
        alive -= 1

    overlap((job() for _ in range(20)), 3)
    assert (alive, peak) == (0, 3)


@pytest.mark.parametrize(
    ("size", "replicas", "device", "expected"),
    [
        # Large on 16 replicas: two experts a rank in each of 54 layers, three matrices each. By hand: a replica
        # computes 21 of 324, which saves 303 · 8.7e11 FLOP at 400e12, 0.66 s; 15 · 21 · 18.9 MB at 40e9 is 0.15 s
        ((324, 3072, 3072), 16, "cuda", True),
        # 24 · 2560 FLOP at 50e9 is 1.23 µs, and 24 · 48 bytes at 1e9 is 1.15 µs; [2, 6] saves 24 · 560 for 24 · 24
        ((48, 4, 6), 2, "cpu", True),
        ((48, 2, 6), 2, "cpu", False),
        # 5 · 6k³ FLOP at 400e12 against 2k² bytes at 40e9: even at k = 667
        ((2, 700, 700), 2, "cuda", True),
        ((2, 640, 640), 2, "cuda", False),
        ((1, 3072, 3072), 2, "cuda", False),  # one replica would compute, the other wait
        ((0, 3072, 3072), 2, "cuda", False),
    ],
)
def test_sharing_pays(size: tuple[int, int, int], replicas: int, device: str, expected: bool) -> None:
    assert sharing_pays(size[0], size[1:], 5, replicas, torch.bfloat16, device) == expected
