"""Between a kill and the resume everything can change: what is accepted, what is refused, and what starts over."""

import time

import pytest
import tiny
import torch

from vdbench import checkpoint, posterior, records, training
from vdbench.config import RunSpec

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = tiny.spec("vd_warmup", epochs=3)


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """The folder of a run that was cut off in its third epoch."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(checkpoint, "hardware", lambda device: "CPU 1")

    def cut_off(facts):
        if facts["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.train(SPEC, tmp_path / "run", report=cut_off)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    torch.set_num_threads(1)
    return tiny.train(SPEC, tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda patch: torch.set_num_threads(2), "threads 1, now 2"),
        (lambda patch: patch.setattr(torch, "__version__", "9.9.9"), "now 9.9.9"),
        (lambda patch: patch.setattr(posterior, "_HAS_BFLOAT16", not posterior._HAS_BFLOAT16), "variance_dtype "),
    ],
    ids=["threads", "torch", "kind of processor"],
)
def test_what_would_change_numbers_is_refused_and_the_checkpoint_kept(
    change, said, interrupted, undisturbed, monkeypatch
):
    before = (interrupted / "resume.pt").read_bytes()
    with monkeypatch.context() as patch:
        change(patch)
        with pytest.raises(records.RecordError, match=r"resume\.pt: 2 epochs were trained with") as caught:
            tiny.train(SPEC, interrupted)
    assert said in str(caught.value)
    assert "run it as it was begun, or delete the file to start over" in str(caught.value)
    assert (interrupted / "resume.pt").read_bytes() == before
    torch.set_num_threads(1)
    assert tiny.train(SPEC, interrupted).weights_sha256 == undisturbed.weights_sha256


def test_another_device_is_refused(interrupted):
    """Read as a machine with a GPU would, without having one."""
    saved = torch.load(interrupted / "resume.pt", weights_only=True)
    there = checkpoint.Identity(saved["run"], saved["circumstances"] | {"device": "cuda"}, saved["noted"])
    with pytest.raises(records.RecordError, match="device cpu, now cuda"):
        checkpoint.Checkpoint(interrupted / "resume.pt", there).load()


def test_another_processor_of_the_same_kind_is_accepted_and_the_record_says_so(interrupted, undisturbed, monkeypatch):
    monkeypatch.setattr(checkpoint, "hardware", lambda device: "CPU 2")
    record = tiny.train(SPEC, interrupted)
    assert record.message == "hardware CPU 1 up to epoch 2, then CPU 2"
    assert record.status == "ok"
    assert record.weights_sha256 == undisturbed.weights_sha256  # it is the same one, after all
    assert undisturbed.message == ""


def test_a_run_can_change_processors_more_than_once(interrupted, monkeypatch):
    def cut_off(facts):
        if facts["epoch"] == 3:
            raise KeyboardInterrupt

    for number in (2, 3):
        monkeypatch.setattr(checkpoint, "hardware", lambda device, number=number: f"CPU {number}")
        saved = checkpoint.Checkpoint(
            interrupted / "resume.pt",
            checkpoint.Identity.of(SPEC, training.Job("train", SPEC, "").code.digest, {}, "cpu"),
        )
        saved.save(saved.load(), 1.0)  # type: ignore[arg-type]
    assert (
        tiny.train(SPEC, interrupted).message
        == "hardware CPU 1 up to epoch 2, then CPU 2; hardware CPU 2 up to epoch 2, then CPU 3"
    )


def test_clocks_that_jump_change_nothing(interrupted, undisturbed, monkeypatch):
    """Backwards by a year, forwards by ten, while it goes on: intervals are taken from clocks that cannot be set."""
    real, jumps = time.time, iter([-3e7, 3e8] * 10_000)
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    record = tiny.train(SPEC, interrupted)
    assert record.weights_sha256 == undisturbed.weights_sha256
    assert 0 < record.wall_s < 600


def own_pictures(shade: float) -> tuple[RunSpec, training.Dataset]:
    data = tiny.dataset()
    images = data.train_images * shade
    spec = SPEC.model_copy(update={"dataset": "folder:pets"})
    return spec, type(data)("folder:pets", images, data.train_labels, data.eval_images, data.eval_labels, 10)


def test_pictures_that_changed_start_over(tmp_path, monkeypatch, caplog):
    """A name alone does not say what is in a folder of the user's own."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    (spec, before), (_, after) = own_pictures(1.0), own_pictures(0.9)

    def cut_off(facts):
        if facts["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.train(spec, tmp_path / "run", before, report=cut_off)
    mixed, fresh = (tiny.train(spec, tmp_path / name, after) for name in ("run", "fresh"))
    assert "starting over" in caplog.text
    assert mixed.weights_sha256 == fresh.weights_sha256
