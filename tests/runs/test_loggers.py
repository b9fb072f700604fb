from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pyro_vae import TrainingRecord
from pyro_vae.runs.loggers import TensorBoard


def test_tensorboard_shows_all_numbers_of_a_record_by_step(tmp_path):
    board = TensorBoard(tmp_path)
    for epoch in (1, 2):
        board.record(TrainingRecord(epoch, 7 * epoch, {"loss": 3.0 / epoch}, {"loss": 4.0}, {"seconds": 0.5}))
    board.record(TrainingRecord(3, 21, {"loss": 1.0}))  # without test data
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "test/loss", "timing/seconds"}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(7, 3.0), (14, 1.5), (21, 1.0)]
    assert [event.step for event in events.Scalars("test/loss")] == [7, 14]
