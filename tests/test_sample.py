"""`python -m cosmos_mp sample`: the mp4 that comes out, its sources of control, and chunks of a long control."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch

from cosmos_mp import sample as module
from cosmos_mp.config import ConfigError
from cosmos_mp.data.controls import edge, edge_thresholds
from cosmos_mp.data.synthetic import synthesize
from cosmos_mp.data.video import VideoError, probe, read_video
from cosmos_mp.sample import chunk_starts, sample
from cosmos_mp.tokenizers import build_tokenizer
from cosmos_mp.tokenizers.frames import frames_to_video, video_to_frames

PROMPT = ("--prompt", "a red circle moving right")


@pytest.fixture
def video(tiny_chain):
    return tiny_chain.root / "videos" / "videos" / "000000.mp4"


@pytest.fixture
def run(tiny_chain, tmp_path):
    """Sample with options; returns the file's frames."""

    def run(out: str, *options):
        path = sample(tiny_chain.config("sample", str(tmp_path / out), *options))
        assert path == tmp_path / out
        return read_video(path)[0]

    return run


def write_lossless(path, frames: np.ndarray, fps: int = 8) -> None:
    """A ready control video whose decoded frames are exactly these."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=fps)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    assert np.array_equal(read_video(path)[0], frames)


@pytest.fixture
def long_control(tmp_path):
    """A control of 20 frames: two and a half clips."""
    synthesize(tmp_path / "long", 1, seed=3, frames=20)
    frames = read_video(tmp_path / "long" / "videos" / "000000.mp4")[0]
    write_lossless(tmp_path / "long.mkv", edge(frames, 100, 200))
    return tmp_path / "long.mkv"


# --- One clip ---


def test_the_file_has_the_clips_frames_size_and_rate(run, tmp_path, video):
    frames = run("a.mp4", *PROMPT, "--video", video)
    facts = probe(tmp_path / "a.mp4")
    assert (facts.num_frames, facts.height, facts.width, facts.fps) == (9, 64, 64, 8.0)
    assert frames.std() > 1


def test_the_same_words_give_the_same_bytes(run, tmp_path, video):
    run("a.mp4", *PROMPT, "--video", video)
    run("b.mp4", *PROMPT, "--video", video)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    "change",
    [("--seed", "1"), ("--prompt", "a blue square moving up"), ("--control_weight", "0"), ("--clip.edge_preset", "very_low")],
    ids=lambda change: change[0],
)
def test_seed_caption_and_control_matter(run, video, monkeypatch, change):
    answers = record_answers(monkeypatch)
    run("a.mp4", *PROMPT, "--video", video)
    run("b.mp4", *PROMPT, "--video", video, *change)
    assert not torch.equal(*answers)


def test_a_video_and_its_own_control_give_the_same_clip(run, tmp_path, video):
    frames = read_video(video)[0]
    low, high = edge_thresholds("medium", seed=0, clip_id=str(video), draw=0)
    write_lossless(tmp_path / "control.mkv", edge(frames, low, high))
    from_video = run("a.mp4", *PROMPT, "--video", video)
    from_control = run("b.mp4", *PROMPT, "--control", tmp_path / "control.mkv")
    assert np.array_equal(from_video, from_control)


def test_a_control_can_be_blurred_frames(run, video):
    frames = run("a.mp4", *PROMPT, "--video", video, "--clip.control", "vis")
    assert frames.shape == (9, 64, 64, 3)


def test_a_video_of_another_size_is_fitted(run, tmp_path):
    synthesize(tmp_path / "wide", 1, seed=0, height=80, width=128)
    assert run("a.mp4", *PROMPT, "--video", tmp_path / "wide" / "videos" / "000000.mp4").shape == (9, 64, 64, 3)


def test_a_student_without_given_frames_answers_the_first_clip_alone(run, long_control):
    assert len(run("a.mp4", *PROMPT, "--control", long_control)) == 9


def record_answers(monkeypatch) -> list[torch.Tensor]:
    """The student's latents, in the order of its calls."""
    answers, real = [], module.one_step

    def one_step(student, epsilon, condition):
        answer = real(student, epsilon, condition)
        answers.append(answer.x0)
        return answer

    monkeypatch.setattr(module, "one_step", one_step)
    return answers


# --- Chunks ---


def test_chunk_starts_share_one_frame():
    assert chunk_starts(9, 9, True) == [0]
    assert chunk_starts(10, 9, True) == [0, 8]
    assert chunk_starts(17, 9, True) == [0, 8]
    assert chunk_starts(18, 9, True) == [0, 8, 16]
    assert chunk_starts(1, 1, False) == [0]
    assert chunk_starts(100, 9, False) == [0]


def test_chunks_cover_every_frame_once_beside_the_shared_one():
    for frames in range(5, 40):
        starts = chunk_starts(frames, 5, True)
        covered = [frame for number, start in enumerate(starts) for frame in range(start + min(number, 1), start + 5)]
        assert covered[:frames] == list(range(frames))
        assert len(covered) < frames + 4, "no chunk is made of filling alone"


@pytest.mark.parametrize("chained", [True, False])
def test_a_control_shorter_than_a_clip_is_refused(chained):
    with pytest.raises(ConfigError, match="the control has 8 frames, a clip needs 9: give a longer one"):
        chunk_starts(8, 9, chained)


def test_a_student_without_given_frames_says_that_it_makes_one_clip(run, capsys, long_control):
    assert len(run("one.mp4", *PROMPT, "--control", long_control)) == 9
    assert "note: 9 of the control's 20 frames are answered" in capsys.readouterr().out
    run("all.mp4", *PROMPT, "--control", long_control, "--diffusion.condition_frames", "1")
    assert "note" not in capsys.readouterr().out


def test_each_chunk_starts_from_the_last_frame_of_the_one_before(run, tiny_chain, monkeypatch, long_control):
    answers = record_answers(monkeypatch)
    frames = run("a.mp4", *PROMPT, "--control", long_control, "--diffusion.condition_frames", "1")
    assert len(frames) == 20 and len(answers) == 3
    tokenizer = build_tokenizer(tiny_chain.config("sample", "x").tokenizer)
    chunks = [video_to_frames(tokenizer.decode(answer))[0] for answer in answers]
    for before, answer, chunk in zip(chunks, answers[1:], chunks[1:], strict=False):
        given = tokenizer.encode(frames_to_video(before[-1:][None]))
        assert torch.equal(answer[:, :, :1], given)
        reconstruction = video_to_frames(tokenizer.decode(given))[0, 0]
        assert np.array_equal(chunk[0], reconstruction)
    # The file leaves out each later chunk's shared frame, and the filling at the end. H.264 costs a few levels.
    joined = np.concatenate([chunks[0], chunks[1][1:], chunks[2][1:]])[:20]
    assert np.abs(joined.astype(float) - frames).mean() < 3


# --- Errors ---


def test_what_cannot_be_sampled_is_refused_before_the_student_is_read(run, video):
    nowhere = ("--student", "absent")
    with pytest.raises(ConfigError, match="no caption: give --prompt"):
        run("a.mp4", *nowhere, "--video", video)
    for sources in ((), ("--video", video, "--control", video)):
        with pytest.raises(ConfigError, match="give one of --video .* and --control"):
            run("a.mp4", *nowhere, *PROMPT, *sources)
    with pytest.raises(ConfigError, match="the control has 9 frames, a clip needs 17"):
        run("a.mp4", *nowhere, *PROMPT, "--video", video, "--clip.frames", "17")
    with pytest.raises(ConfigError, match="a depth control is not computed here.*--control"):
        run("a.mp4", *nowhere, *PROMPT, "--video", video, "--clip.control", "depth")


def test_files_that_are_not_there_are_named(run, video, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.mp4"):
        run("a.mp4", *PROMPT, "--video", tmp_path / "absent.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match="broken.mp4"):
        run("a.mp4", *PROMPT, "--control", tmp_path / "broken.mp4")
    with pytest.raises(FileNotFoundError, match="absent: no such weight file"):
        run("a.mp4", *PROMPT, "--video", video, "--student", "absent")
    assert not (tmp_path / "a.mp4").exists()
