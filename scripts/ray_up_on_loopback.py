"""Run `ray up`, `ray submit`, `ray job submit`, `ray job stop` and `ray down` over SSH, on this machine alone.

    laptop (a home) ── ssh, rsync, 127.0.0.1:22 ──► head (another home) ◄── other machine (a third home): --resume
                                                      └── run folder at a URL that all of them see

    python scripts/ray_up_on_loopback.py [--out result.json]

cluster.yaml's own commands run, except for the installation of Python packages. Ray's provider for existing machines
replaces AWS. Needs root, Debian's openssh-server and rsync, and `unshare`: sshd, Ray and all other processes run in a
namespace of their own and end with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from sandbox import RAY, ROOT, SMALL, SYLVA, adapters, enter, finish, result_file, say, temporary_home, wait_until

from sylva_ray.config.schema import read_yaml
from sylva_ray.core.yaml import to_yaml
from sylva_ray.storage.run_folder import RunFolder

CONFIG = [*SMALL, "training.rounds=6"]
NEEDS = ("sshd", "ssh", "rsync", "ssh-keygen", "curl")
DASHBOARD = "http://127.0.0.1:8265"


def start_sshd(work: Path, home: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """Start an sshd that accepts one key and logs in to the home of the head; return it and the key."""
    for name in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(work / name)], check=True)
    lines = Path("/etc/passwd").read_text().splitlines()
    fields = next(line.split(":") for line in lines if line.startswith("root:"))
    fields[5] = str(home)
    (work / "passwd").write_text(
        "\n".join([":".join(fields), *(ln for ln in lines if not ln.startswith("root:"))]) + "\n"
    )
    subprocess.run(["mount", "--bind", str(work / "passwd"), "/etc/passwd"], check=True)  # in this mount namespace only
    Path("/run/sshd").mkdir(exist_ok=True)
    settings = {
        "ListenAddress": "127.0.0.1:22",
        "HostKey": work / "host",
        "AuthorizedKeysFile": work / "key.pub",
        "PidFile": "none",
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
        "StrictModes": "no",
        "UsePAM": "no",
    }
    (work / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", str(work / "sshd_config")], stderr=subprocess.DEVNULL)
    return server, work / "key"


def loopback_cluster(work: Path, key: Path, dist: Path) -> dict[str, object]:
    """Return cluster.yaml with this machine as its head, without the commands that need the internet."""
    shipped = read_yaml(ROOT / "cluster.yaml")
    settings = (
        shipped["setup_commands"][0]
        .replace("s3://FILL_IN", f"file://{work}/bucket")
        .replace("/home/ubuntu", f"{work}/head")
    )
    return {
        "cluster_name": "loopback",
        "provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []},
        "auth": {"ssh_user": "root", "ssh_private_key": str(key)},
        "file_mounts": shipped["file_mounts"] | {"~/dist": str(dist)},
        "setup_commands": [
            settings,
            f"ln -sfn {Path(sys.executable).parents[1]} ~/sylva",  # in place of the lines with uv
            shipped["setup_commands"][-1],
        ],
        "head_setup_commands": ["mkdir -p ~/data ~/mlflow"],
        "head_start_ray_commands": shipped["head_start_ray_commands"],
    }


def call(command: list[str], check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command from the repository; with ``check``, end the script with its output if it fails."""
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=400, check=False
    )
    if check and done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def last_line(text: str) -> str:
    """Return the last line of an output."""
    return (text.strip().splitlines() or [""])[-1]


@dataclass(frozen=True)
class Refusal:
    """How `sylva-ray run` ends that cannot use a cluster: exit code, lines of output, the last one, and its seconds."""

    exit: int
    lines: int
    says: str
    seconds: int


def refused(*overrides: str, **environment: str) -> Refusal:
    """Run `sylva-ray run` on a cluster that it cannot use."""
    began = time.monotonic()
    done = call([*SYLVA, "run", "configs/digits.yaml", *CONFIG, *overrides, "--out", "never"], False, **environment)
    # Ray adds a line where there is no network.
    lines = [line for line in done.stderr.strip().splitlines() if "network_util.cc" not in line]
    return Refusal(done.returncode, len(lines), last_line(done.stderr), round(time.monotonic() - began))


def main() -> None:
    """Run the scenario."""
    out = result_file(__doc__)
    enter()
    laptop = temporary_home()
    work = laptop / "w"
    head, shared = work / "head", work / "shared" / "run"
    for folder in (head, shared.parent, work / "bucket", work / "elsewhere", laptop / "dist"):
        folder.mkdir(parents=True)
    os.environ.update(RAY_UP_enable_autoscaler_v2="0")  # Ray's newer autoscaler does not know this provider
    result: dict[str, object] = {}
    reference = [*SYLVA, "run", "configs/digits.yaml", *CONFIG, "cluster.pool=in_process", "--quiet"]
    call([*reference, "--out", str(work / "reference")])
    say("the reference: one process, not interrupted")

    server, key = start_sshd(work, head)
    cluster = loopback_cluster(work, key, laptop / "dist")
    (laptop / "dist" / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    (head / ".bashrc").write_text(
        f"case $- in *i*) ;; *) return ;; esac\nexport PYTHONPATH={ROOT}\n"
    )  # as Debian's begins
    file = work / "loopback.yaml"
    file.write_text(to_yaml(cluster))
    say(last_line(call([*SYLVA, "cluster", "check", str(file)]).stdout.splitlines()[0].replace(str(work), "...")))
    began = time.monotonic()
    call([*RAY, "up", "-y", "--no-config-cache", str(file)])
    result["ray_up_seconds"] = round(time.monotonic() - began)
    say(f"`ray up` over SSH: {result['ray_up_seconds']} s; token, dist/ and settings are on the head")
    result["mounted"] = sorted(
        name for name in (".ray/auth_token", "dist/constraints.txt", "sylva_ray.env") if (head / name).is_file()
    )
    (work / "hello.py").write_text(
        "import ray\nray.init(address='auto')\nprint('CPUs:', ray.cluster_resources()['CPU'])\n"
    )
    said = call([*RAY, "submit", str(file), str(work / "hello.py")]).stdout
    result["ray_submit"] = next((line for line in said.splitlines() if "CPUs:" in line), "")
    say(f"`ray submit`: {result['ray_submit']}")

    address = "cluster.address=127.0.0.1:6379"
    refusals = {
        "wrong_token": refused(address, RAY_AUTH_TOKEN="0" * 64),
        "no_token": refused(address, RAY_AUTH_MODE="disabled"),
        "unreachable": refused("cluster.address=127.0.0.1:6380"),
        "too_many_gpus": refused(address, "cluster.gpus_per_actor=8"),
    }
    for name, refusal in refusals.items():
        result[name] = asdict(refusal)
        say(f"{name}: exit {refusal.exit}: {refusal.says}")

    url = shared.as_uri()
    entry = ["sylva-ray", "run", "configs/digits.yaml", *CONFIG, "cluster.address=auto", "--out", url]
    job = ["--address", DASHBOARD, "--working-dir", ".", "--submission-id", "fleet", "--no-wait", "--", *entry]
    call([*RAY, "job", "submit", *job])
    say("`ray job submit --working-dir . -- sylva-ray run ... --out URL`")
    try:
        wait_until((shared / "checkpoint/round_0002/manifest.json").exists, "a checkpoint at the URL", 600)
    except SystemExit:
        print(call([*RAY, "job", "logs", "--address", DASHBOARD, "fleet"], False).stdout[-3000:])
        raise
    call([*RAY, "job", "stop", "--address", DASHBOARD, "fleet"])
    log = call([*RAY, "job", "logs", "--address", DASHBOARD, "fleet"]).stdout
    result["log_steps"] = sum(line.lstrip().startswith("step ") for line in log.splitlines())
    hint = next((line for line in log.splitlines() if "Resume with" in line), "")
    result["log_resume"] = hint
    result["job"] = last_line(call([*RAY, "job", "status", "--address", DASHBOARD, "fleet"], False).stdout)
    result["finished_too_early"] = RunFolder(shared).summary_file.exists()
    say(f"`ray job stop`: {result['log_steps']} steps in the log, and: {hint.replace(str(work), '...')}")

    again = [*SYLVA, "run", url, "cluster.pool=in_process", "cluster.address=null", "--resume", "--quiet"]
    call(again, HOME=str(work / "elsewhere"))
    result["same_adapters"] = adapters(shared) == adapters(work / "reference") != {}
    bits = "the same bits" if result["same_adapters"] else "DIFFERENT BITS"
    say(f"resumed on another machine: {bits} as without the interruption")
    began = time.monotonic()
    call([*RAY, "down", "-y", str(file)])
    result["ray_down_seconds"] = round(time.monotonic() - began)
    result["refused_after_down"] = refused(address).exit
    say(f"`ray down`: {result['ray_down_seconds']} s; the cluster no longer answers")
    server.terminate()
    server.wait()
    shutil.rmtree(laptop, ignore_errors=True)
    finish(result, out, work)


if __name__ == "__main__":
    main()
