"""Launchers for Slurm and TPUs: dry runs, executed commands and errors.

Executables at the front of PATH stand in for the real tools.
"""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from runs import ROOT

from stackjax.config_file import load_config
from stackjax.training.preflight import check

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.sh"))
TRAIN = shlex.split("--config configs/gstack_1b.py --stages.1.growth 'stack(4)'")
TRAIN += ["--workdir", "it's $HOME & \\"]

SLURM = shlex.split("slurm.sh --nodes 4 --gpus 8 --time 24:00:00")
SLICE = shlex.split("--name a-slice --zone a-zone")
CREATE = ["tpu_vm.sh", "create", *SLICE, "--type", "v5litepod-64", "--version", "a-version"]
INSTALL = ["tpu_vm.sh", "install", *SLICE]
RUN = ["tpu_vm.sh", "run", *SLICE]
GKE = shlex.split("gke.sh --cluster a-cluster --zone a-zone --workload a-run")
GKE += ["--type", "v5litepod-64", "--image", "an-image"]
MORE = shlex.split("--cpus=12 --grace=600 --name n --partition p --account a --setup")

# Each launch: command, called tools, and words in their arguments.
LAUNCHES = {
    "slurm": (
        [*SLURM, "--", *TRAIN],
        ["sbatch"],
        "--nodes=4 --ntasks-per-node=8 --gres=gpu:8 --cpus-per-task=8 --time=24:00:00 "
        "--signal=TERM@300 --requeue --open-mode=append --kill-on-bad-exit=1",
    ),
    "slurm, every option": (
        [*SLURM, *MORE, ". env/bin/activate", "--", *TRAIN],
        ["sbatch"],
        "--cpus-per-task=12 --signal=TERM@600 --job-name=n --partition=p --account=a "
        "env/bin/activate",
    ),
    "create": (
        CREATE,
        ["gcloud"],
        "queued-resources create a-slice --node-id=a-slice --zone=a-zone "
        "--accelerator-type=v5litepod-64 --runtime-version=a-version",
    ),
    "create, spot": ([*CREATE, "--spot"], ["gcloud"], "--spot"),
    "install": (INSTALL, ["tar", "gcloud", "gcloud"], "scp --worker=all requirements-tpu.txt"),
    "run": ([*RUN, "--", *TRAIN], ["gcloud"], "ssh a-slice --zone=a-zone --worker=all"),
    "log": (["tpu_vm.sh", "log", *SLICE], ["gcloud"], "ssh a-slice --worker=0 tail"),
    "stop": (["tpu_vm.sh", "stop", *SLICE], ["gcloud"], "ssh a-slice --worker=all kill -TERM"),
    "delete": (["tpu_vm.sh", "delete", *SLICE], ["gcloud"], "queued-resources delete a-slice"),
    "gke": (
        [*GKE, "--restarts", "3", "--", *TRAIN],
        ["xpk"],
        "workload create --cluster=a-cluster --zone=a-zone --workload=a-run "
        "--tpu-type=v5litepod-64 --docker-image=an-image --max-restarts=3 "
        "--termination-grace-period-seconds=300",
    ),
}

MISTAKES = {
    "slurm, missing": ([*SLURM[:3], "--", *TRAIN], "--gpus is missing"),
    "slurm, unknown": ([*SLURM, "--gpu", "8", "--", *TRAIN], "unknown option --gpu"),
    "slurm, unknown word": ([*SLURM, "8", "--", *TRAIN], "unknown option 8"),
    "slurm, no value": ([*SLURM, "--name", "--", *TRAIN], "--name needs a value"),
    "slurm, no value at the end": ([*SLURM, "--name"], "--name needs a value"),
    "slurm, nothing to train": ([*SLURM, "--"], "end with -- --config FILE"),
    "slurm, no dashes": (SLURM, "end with -- --config FILE"),
    "tpu, no action": (["tpu_vm.sh", *SLICE], "the action is missing"),
    "tpu, nothing": (["tpu_vm.sh"], "the action is missing"),
    "tpu, unknown action": (["tpu_vm.sh", "start", *SLICE], "unknown action start"),
    "tpu, missing": (CREATE[:-2], "--version is missing"),
    "tpu, missing zone": (INSTALL[:-2], "--zone is missing"),
    "tpu, unknown": ([*INSTALL, "--all"], "unknown option --all"),
    "tpu, no value": ([*INSTALL, "--type"], "--type needs a value"),
    "tpu, nothing to train": (RUN, "end with -- --config FILE"),
    "gke, missing": (["gke.sh", *GKE[3:], "--", *TRAIN], "--cluster is missing"),
    "gke, unknown": ([*GKE, "--chips=4", "--", *TRAIN], "unknown option --chips"),
    "gke, no value": ([*GKE, "--grace=", "--", *TRAIN], "--grace needs a value"),
    "gke, nothing to train": (GKE, "end with -- --config FILE"),
}

# Logs arguments and stdin.
LOG = """{ printf '> %s:' "${0##*/}"; printf ' %q' "$@"; echo; cat; } >>"$NOTES"\n"""
# Stand-ins that run the command locally. `wait` lets background jobs of ssh finish, because
# the test reads their output.
LOCAL_TOOLS = {
    "sbatch": 'cat >"$NOTES.batch"; exec bash "$NOTES.batch"\n',
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"\n',
    "scontrol": LOG,
    "xpk": """for arg; do [[ "$arg" != --command=* ]] || bash -c "${arg#*=}"; done\n""",
    "gcloud": """cd "$HOME"
for arg; do [[ "$arg" != --command=* ]] || bash -c "${arg#*=}
wait"; done\n""",
    "python": """printf '%s\\n' "$PWD" "$@" >"$NOTES.train"; exit "$CODE"\n""",
}
LOGGING_TOOLS = dict.fromkeys(("sbatch", "srun", "gcloud", "xpk", "tar"), LOG)


def execute(path: Path, tools: dict[str, str], *args: str, **env: str):
    """Runs a command with `tools` first on PATH; returns the result and the logged calls."""
    tools_path, notes = path / "tools", path / "notes"
    tools_path.mkdir(parents=True)
    for name, body in tools.items():
        (tools_path / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (tools_path / name).chmod(0o755)
    environment = {"PATH": f"{tools_path}:{os.environ['PATH']}", "NOTES": str(notes)}
    ended = subprocess.run(
        args,
        cwd=ROOT,
        env=os.environ | environment | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return ended, notes.read_text() if notes.exists() else ""


def launch(path: Path, tools: dict[str, str], command: list[str], *more: str, **env: str):
    """Runs a launcher; the arguments `more` precede `--`."""
    end = command.index("--") if "--" in command else len(command)
    words = [*command[1:end], *more, *command[end:]]
    return execute(path, tools, str(ROOT / "scripts" / command[0]), *words, **env)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
    shellcheck = Path(sysconfig.get_path("scripts")) / "shellcheck"
    found = subprocess.run([shellcheck, script], cwd=ROOT / "scripts", capture_output=True)
    assert (found.returncode, found.stdout.decode()) == (0, "")


@pytest.mark.parametrize("name", LAUNCHES)
def test_dry_run_prints_the_command_and_runs_nothing(name, tmp_path):
    command, _, words = LAUNCHES[name]
    ended, notes = launch(tmp_path, LOGGING_TOOLS, command, "--dry-run")
    assert (ended.returncode, ended.stderr, notes) == (0, "", "")
    for word in words.split():
        assert word in ended.stdout
    assert ("stackjax.train" in ended.stdout) == ("--" in command)


@pytest.mark.parametrize("name", LAUNCHES)
def test_printed_command_is_the_executed_command(name, tmp_path):
    command, tools, _ = LAUNCHES[name]
    printed, _ = launch(tmp_path / "dry", LOGGING_TOOLS, command, "--dry-run")
    pasted, expected = execute(tmp_path / "pasted", LOGGING_TOOLS, "bash", "-c", printed.stdout)
    ran, notes = launch(tmp_path / "run", LOGGING_TOOLS, command)
    assert (pasted.returncode, ran.returncode) == (0, 0)
    assert notes == expected
    assert re.findall(r"^> (\w+):", notes, re.MULTILINE) == tools


@pytest.mark.parametrize("name", ["slurm", "slurm, every option"])
def test_batch_script_parses_and_starts_with_options(name, tmp_path):
    printed, _ = launch(tmp_path, LOGGING_TOOLS, LAUNCHES[name][0], "--dry-run")
    batch = printed.stdout.removeprefix("sbatch <<'BATCH'\n").partition("\nBATCH\n")[0]
    first, *lines = batch.splitlines()
    assert first == "#!/usr/bin/env bash"
    # Slurm ignores options after the first command.
    options = [line.startswith("#SBATCH --") for line in lines]
    assert options == sorted(options, reverse=True)
    subprocess.run(["bash", "-n"], input=batch, text=True, check=True)


@pytest.mark.parametrize("name", ["slurm", "run", "gke"])
def test_arguments_after_dashes_reach_training_unchanged(name, tmp_path):
    home = tmp_path / "stackjax"
    (home / ".venv" / "bin").mkdir(parents=True)
    (home / ".venv" / "bin" / "python").symlink_to(tmp_path / "tools" / "python")
    launch(tmp_path, LOCAL_TOOLS, LAUNCHES[name][0], HOME=str(tmp_path), CODE="0")
    place, *words = (tmp_path / "notes.train").read_text().splitlines()
    assert words == ["-m", "stackjax.train", *TRAIN]
    assert Path(place) == (home if name == "run" else ROOT)


@pytest.mark.parametrize(("code", "is_queued"), [(0, False), (2, False), (143, True)])
def test_only_a_preempted_run_is_requeued(code, is_queued, tmp_path):
    job = {"CODE": str(code), "SLURM_JOB_ID": "7"}
    ended, notes = launch(tmp_path, LOCAL_TOOLS, LAUNCHES["slurm"][0], **job)
    assert ended.returncode == code
    assert notes == ("> scontrol: requeue 7\n" if is_queued else "")


@pytest.mark.parametrize("name", MISTAKES)
def test_error_is_one_line_with_exit_code_2(name, tmp_path):
    command, message = MISTAKES[name]
    ended, notes = launch(tmp_path, LOGGING_TOOLS, command)
    assert (ended.returncode, ended.stdout, notes) == (2, "", "")
    way_out = f"; scripts/{command[0]} --help lists all options.\n"
    assert ended.stderr.startswith("error: ") and ended.stderr.endswith(way_out)
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["slurm.sh", "tpu_vm.sh", "gke.sh"])
def test_help_lists_every_option(script, tmp_path):
    text = (ROOT / "scripts" / script).read_text()
    arms = re.findall(r"^ {4}(--[a-z-]+(?: \| --[a-z-]+)*)\)", text, re.MULTILINE)
    options = {option for arm in arms for option in arm.split(" | ")}
    ended, notes = launch(tmp_path, LOGGING_TOOLS, [script], "--help")
    assert (ended.returncode, ended.stderr, notes) == (0, "", "")
    assert set(re.findall(r"^ {2}(--[a-z-]+)", ended.stdout, re.MULTILINE)) == options


def examples() -> list[tuple[str, int]]:
    """Returns each training command in docs/clusters.md and the number of devices."""
    text = (ROOT / "docs" / "clusters.md").read_text().replace("\\\n", " ")
    found = []
    for block in re.findall(r"```\n(.*?)```", text, re.DOTALL):
        for line in re.findall(r"^.*--config.*$", block, re.MULTILINE):
            # A plain training command has 8 devices; the `create` command sizes a slice.
            sizes = re.findall(r"--(?:nodes|gpus) (\d+)", line)
            chips = re.findall(r"--type v5litepod-(\d+)", block)
            found.append((" ".join(line.split()), math.prod(map(int, sizes or chips or [8]))))
    return found


@pytest.mark.parametrize(("example", "num_devices"), examples())
def test_examples_in_the_docs_fit_their_devices(example, num_devices, tmp_path):
    command, _, rest = example.partition(" -- ")
    if command.startswith("scripts/"):
        ended, _ = execute(
            tmp_path, LOGGING_TOOLS, *shlex.split(command), "--dry-run", "--", rest
        )
        assert (ended.returncode, ended.stderr) == (0, "")
    else:
        rest = example.removeprefix("python -m stackjax.train ")
    check(load_config("test", rest.split()), num_devices)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_image_has_the_package_and_the_platforms_requirements(platform, tmp_path):
    text = (ROOT / f"docker/{platform}.Dockerfile").read_text()
    sources = [
        source
        for line in text.splitlines()
        if line.startswith("COPY ")
        for source in line.split()[1:-1]
    ]
    for source in sources:
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, tmp_path / source)
    [requirements] = re.findall(r"--requirement (\S+)", text)
    assert platform in requirements and (tmp_path / requirements).is_file()
    for included in re.findall(r"-r (\S+)", (tmp_path / requirements).read_text()):
        assert (tmp_path / included).is_file()
    command = [sys.executable, "-m", "stackjax.train", "--config", "configs/gstack_1b.py", "-h"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
