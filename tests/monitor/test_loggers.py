"""TensorBoard's own reader shows every step once, with the last value written."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trinity.monitor.loggers import TensorBoard


def displayed_losses(run: Path) -> dict[int, float]:
    """The losses that TensorBoard shows, by step; each step must be shown once."""
    accumulator = EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    events = accumulator.Scalars("loss")
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}


def log(logger: TensorBoard, steps: range, value: float) -> None:
    for step in steps:
        logger.write({"step": step, "loss": value, "note": None})
    logger._writer.flush()  # as TensorBoard's thread does now and then; no close: the process may be killed


def test_steps_after_a_kill_a_rollback_and_an_early_start(tmp_path: Path) -> None:
    log(TensorBoard(tmp_path, 0), range(1, 4), 0.0)  # killed before its first checkpoint
    assert displayed_losses(tmp_path) == dict.fromkeys(range(1, 4), 0.0)
    log(TensorBoard(tmp_path, 0), range(1, 7), 1.0)  # killed after step 6, with a checkpoint of step 4
    logger = TensorBoard(tmp_path, 4)
    log(logger, range(5, 10), 2.0)
    assert displayed_losses(tmp_path) == dict.fromkeys(range(1, 5), 1.0) | dict.fromkeys(range(5, 10), 2.0)
    logger.rewind(6)
    log(logger, range(7, 9), 3.0)
    logger.close()
    assert displayed_losses(tmp_path) == {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 7: 3, 8: 3}
