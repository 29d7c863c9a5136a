"""The evaluation on held-out clips: everything it writes, what it keeps, and when it fails."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cosmos_mp import commands, options
from cosmos_mp.config import ConfigError
from cosmos_mp.data.dataset import LatentDataset
from cosmos_mp.data.video import probe
from cosmos_mp.evaluate import run as module
from cosmos_mp.evaluate.features import LatentPCA, NetworkFeatures, RandomConv
from cosmos_mp.evaluate.metrics import frechet
from cosmos_mp.evaluate.run import METRICS, evaluate
from cosmos_mp.parallel.topology import single_process

QUICK = ["--samples", "4", "--diversity_clips", "2", "--diversity_noises", "2", "--timing_repeats", "2", "--sampler.steps", "3"]
WITH_INTERVAL = {
    "mse",
    "frechet_teacher",
    "frechet_latent_pca",
    "frechet_random_conv",
    "sharpness",
    "texture",
    "edge_f1",
    "diversity",
    "network_ms",
    "end_to_end_ms",
}


@pytest.fixture(scope="module")
def evaluated(tiny_chain):
    """One evaluation with the full 36 guided steps: its folder and what it returns."""
    words = tiny_chain.words("evaluate", "evaluated", *QUICK, "--sampler.steps", 35, "--checks", "calls")
    assert commands.evaluate(words) == 0
    return tiny_chain.root / "evaluated"


@pytest.fixture
def results(evaluated):
    return json.loads((evaluated / "results.json").read_text())


# --- Results ---


def test_every_variant_has_every_metric_with_its_interval(results):
    assert list(results["variants"]) == ["teacher", "teacher 1-step", "KD", "DMD2"]
    assert {metric["key"] for metric in results["metrics"]} == WITH_INTERVAL | {"calls"}
    for name, values in results["variants"].items():
        expected = {metric["key"] for metric in METRICS} - ({"mse"} if name == "teacher" else set())
        assert set(values) == expected, name
        for key in WITH_INTERVAL & expected:
            assert values[key]["low"] <= values[key]["value"] <= values[key]["high"], (name, key)
        assert values["end_to_end_ms"]["value"] > 0 and values["network_ms"]["value"] > 0


def test_calls_are_72_and_1(results):
    assert {name: values["calls"] for name, values in results["variants"].items()} == {
        "teacher": 72,
        "teacher 1-step": 1,
        "KD": 1,
        "DMD2": 1,
    }
    assert [(item["name"], item["passed"]) for item in results["checks"]] == [
        ("KD, network calls", True),
        ("DMD2, network calls", True),
    ]
    assert results["variants"]["teacher"]["network_ms"]["value"] > 10 * results["variants"]["KD"]["network_ms"]["value"]


def test_calls_are_counted_whichever_network_makes_them(tiny_chain):
    """A student that hands the work on to the teacher would be found out."""
    settings = tiny_chain.config("evaluate", "unused", *QUICK)
    topology = single_process()
    networks, clips = module._networks(settings, topology), module._load_clips(settings)
    one = clips.batch.rows(torch.arange(1))
    student, teacher = (module.answer_in_one_step(networks[name]) for name in ("KD", "teacher"))
    epsilon, condition = torch.zeros_like(one.latent_BCTHW), module.condition_of_clips(one)
    assert module._count_calls(networks, lambda: student(epsilon, condition)) == 1
    handed_on = [student, teacher, teacher]
    assert module._count_calls(networks, lambda: [answer(epsilon, condition) for answer in handed_on]) == 3


def test_end_to_end_is_text_control_network_and_decoder_of_each_clip(tiny_chain, monkeypatch):
    settings = tiny_chain.config("evaluate", "unused", *QUICK, "--timing_repeats", 3)
    topology, seen = single_process(), []
    networks, clips = module._networks(settings, topology), module._load_clips(settings)

    class Spy:
        def __init__(self, inner, kind):
            self.inner, self.kind = inner, kind

        def encode(self, value):
            seen.append(f"{self.kind} {len(value)}")
            return self.inner.encode(value)

        def decode(self, value):
            seen.append(f"frames {len(value)}")
            return self.inner.decode(value)

    build, tokenizer = module.build_text_encoder, module.build_tokenizer(settings.tokenizer)
    monkeypatch.setattr(module, "build_text_encoder", lambda *options: Spy(build(*options), "text"))
    kd = {"KD": module._answers(settings, topology, networks)["KD"]}
    networks["KD"].network.register_forward_hook(lambda *_: seen.append("network"))
    costs = module._costs(settings, topology, networks, kd, Spy(tokenizer, "control"), clips)["KD"]
    # One call to count, one to warm up and three to time; then the same with everything around it.
    assert seen == ["network"] * 5 + ["text 1", "control 1", "network", "frames 1"] * 4
    for key in ("network_ms", "end_to_end_ms"):
        assert 0 < costs[key].low <= costs[key].value <= costs[key].high


def test_the_run_is_described(results, evaluated, tiny_chain):
    assert results["run"]["variants"] == ["teacher", "teacher 1-step", "KD", "DMD2"]
    assert (results["run"]["clips"], results["run"]["seed"]) == (4, 0)
    assert 0.5 < results["run"]["edge F1 of the real clips through the tokenizer"] <= 1
    assert options.load(evaluated / "config.json").samples == 4


def test_report_picture_and_clip_are_there(evaluated):
    page = (evaluated / "report.html").read_text()
    assert "data:image/png;base64," in page and "data:video/mp4;base64," in page
    assert "DMD2" in page and "teacher 1-step" in page
    facts = probe(evaluated / "clip.mp4")
    assert facts.num_frames == 9
    # Four clips one under the other; four variants, control and real beside one another; enlarged by a whole factor.
    assert (facts.height // 64, facts.width // 64) == (4 * 3, 6 * 3)
    assert (evaluated / "comparison.png").stat().st_size > 1000


def test_the_distance_to_the_teacher_is_of_the_stored_latents(results, evaluated):
    latents = {name: load_file(evaluated / "latents" / f"{name}.safetensors")["latent"] for name in ("teacher", "KD", "teacher_1-step")}
    for name in ("KD", "teacher 1-step"):
        expected = (latents[name.replace(" ", "_")] - latents["teacher"]).double().pow(2).mean().item()
        assert results["variants"][name]["mse"]["value"] == pytest.approx(expected, rel=1e-5)


def test_real_clips_are_at_no_distance_from_themselves(tiny_chain):
    settings = tiny_chain.config("evaluate", "unused", *QUICK, "--samples", 8)
    topology, clips = single_process(), module._load_clips(settings)
    real, tokenizer = clips.batch.latent_BCTHW, module.build_tokenizer(settings.tokenizer)
    videos = module._decode(tokenizer, real, topology.device)
    teacher = module._networks(settings, topology)["teacher"]
    extractors = [
        NetworkFeatures(module._teacher_features(settings, topology, teacher, clips.batch)),
        LatentPCA.fit(real, 7),
        RandomConv(channels=16),
    ]
    for extractor in extractors:
        features = np.asarray(extractor(real, videos))
        assert len(features) == 8
        moved = np.asarray(extractor(real.flip(3) * 1.5, videos[:, :, ::-1].copy()))
        assert abs(frechet(features, features)) < 1e-6 * frechet(features, moved), extractor.name


def test_clips_are_read_from_their_files_as_they_were_encoded(tiny_chain):
    settings = tiny_chain.config("evaluate", "unused", *QUICK)
    clips, store = module._load_clips(settings), LatentDataset(tiny_chain.root / "clips" / "holdout", 0, expect={})
    tokenizer = module.build_tokenizer(settings.tokenizer)
    assert clips.thresholds == [(100, 200)] * 4
    assert clips.captions == [store.info(i)["caption"] for i in range(4)]
    for frames, field in ((clips.real, "latent"), (clips.control, "control")):
        encoded = tokenizer.encode(module.frames_to_video(frames))
        torch.testing.assert_close(encoded, torch.stack([store.reader.read(i)[field] for i in range(4)]), rtol=1e-4, atol=1e-4)


# --- Latents kept ---


def stamps(folder) -> dict[str, int]:
    return {path.stem: path.stat().st_mtime_ns for path in (folder / "latents").iterdir()}


def test_a_second_run_takes_the_latents_and_other_weights_do_not(tiny_chain):
    out = tiny_chain.root / "twice"
    options = [*QUICK, "--students", f"KD={tiny_chain.root / 'kd'}"]
    first = evaluate(tiny_chain.config("evaluate", "twice", *options))
    before = stamps(out)
    assert set(before) == {"teacher", "teacher_1-step", "KD"}
    second = evaluate(tiny_chain.config("evaluate", "twice", *options))
    assert stamps(out) == before
    for name, values in first["variants"].items():
        assert {k: v for k, v in values.items() if not k.endswith("_ms")} == {
            k: v for k, v in second["variants"][name].items() if not k.endswith("_ms")
        }
    third = evaluate(tiny_chain.config("evaluate", "twice", *QUICK, "--students", f"KD={tiny_chain.root / 'dmd2'}"))
    after = stamps(out)
    assert {name for name in before if before[name] != after[name]} == {"KD"}
    assert third["variants"]["KD"]["mse"] != first["variants"]["KD"]["mse"]


@pytest.mark.parametrize(
    "change",
    [
        ["--seed", 1],
        ["--samples", 3],
        ["--sampler.guidance", 2],
        ["--sampler.steps", 9],
        ["--sampler.unconditional", "negative_prompt"],
        ["--negative_prompt", "a blurred frame"],
        ["--diffusion.sigma_max", 40],
    ],
    ids=lambda change: change[0],
)
def test_latents_of_other_settings_are_other_latents(tiny_chain, change):
    plain, changed = (tiny_chain.config("evaluate", "unused", *QUICK, *options) for options in ([], change))
    clips = module._load_clips(plain)
    assert module._key(plain, clips, "ab") == module._key(plain, clips, "ab")
    assert module._key(changed, clips, "ab") != module._key(plain, clips, "ab") != module._key(plain, clips, "cd")


def test_latents_of_clips_made_anew_at_the_same_path_are_other_latents(tiny_chain, tmp_path):
    settings, keys = tiny_chain.config("evaluate", "unused", *QUICK, "--clips", tmp_path / "clips"), []
    encoded = ["--videos", str(tiny_chain.root / "videos"), "--out", str(tmp_path / "clips"), "--limit", "4"]
    for preset in ("medium", "medium", "very_low"):
        shutil.rmtree(tmp_path / "clips", ignore_errors=True)
        commands.encode(["tiny_encode", *encoded, "--tokenizer.path", settings.tokenizer.path, "--clip.edge_preset", preset])
        keys.append(module._key(settings, module._load_clips(settings), "ab"))
    assert keys[0] == keys[1] != keys[2]


# --- Failure ---


def test_a_check_that_fails_ends_with_status_1_and_the_results_are_kept(tiny_chain, tmp_path, capsys):
    words = tiny_chain.words("evaluate", str(tmp_path), *QUICK, "--checks", "recipe")
    # A student of four iterations has no texture, whatever else it has.
    assert commands.evaluate(words) == 1
    assert "FAILS  DMD2, texture / real" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["checks"]) == 12 and not all(item["passed"] for item in results["checks"])
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (["--students", "runs/kd"], ConfigError, "'runs/kd' must be NAME=WEIGHTS"),
        (["--students", "KD="], ConfigError, "'KD=' must be NAME=WEIGHTS"),
        (["--students", "teacher={root}/kd"], ConfigError, "a name of its own"),
        (["--students", "KD={root}/kd", "KD={root}/dmd2"], ConfigError, "a name of its own"),
        (["--students", "KD={root}/absent"], FileNotFoundError, "absent: no such weight file"),
        (["--videos", "{root}/clips"], FileNotFoundError, "clips.jsonl"),
        (["--index", "{root}/clips"], FileNotFoundError, "clips/clips.jsonl"),
        (["--text.tokens", "9"], ValueError, "text.tokens=12, this run expects 9"),
        (["--clips", "{root}/pairs"], ValueError, "kind=pairs, this run expects clips"),
        (["--features", "{root}/absent.pt"], FileNotFoundError, "absent.pt does not exist"),
        (["--checks", "recipe", "--students", "KD={root}/kd"], ConfigError, "checks=recipe needs a student named DMD2"),
        (["--tokenizer.path", "{root}/absent"], FileNotFoundError, "absent"),
    ],
)
def test_what_cannot_be_evaluated_is_named(tiny_chain, tmp_path, options, error, said):
    options = [option.format(root=tiny_chain.root) for option in options]
    with pytest.raises(error, match=said):
        evaluate(tiny_chain.config("evaluate", str(tmp_path), *QUICK, *options))
    assert not (tmp_path / "latents").exists()
