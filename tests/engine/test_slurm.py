"""A plain srun starts one run of several ranks; in the shell of sbatch, which looks alike, a run is alone."""

import os

import pytest
import tiny
import torch

from ldm3d.engine import distributed
from ldm3d.engine.distributed import first_host, launched, ranks_of_srun, setup

SHELL = {  # of sbatch or salloc, with two tasks
    "SLURM_JOB_ID": "812",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODELIST": "gpu[03-04]",
    "SLURM_JOB_NODELIST": "gpu[03-04]",
}
STEP = SHELL | {  # of a process that srun has started there
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu03", "gpu03"),
        ("gpu[03-06,9],cpu1", "gpu03"),
        ("cpu1,gpu[03-06]", "cpu1"),
        ("gpu[7,9-12]", "gpu7"),
        ("rack[2-3]node[04,07]-ib,login", "rack2node04-ib"),
        ("a-b-1,a-b-2", "a-b-1"),
        ("", ""),
    ],
)
def test_the_first_host_is_read_from_lists_with_brackets(nodes, host):
    assert first_host(nodes) == host


def test_a_task_of_srun_has_the_variables_that_torchrun_would_have_set(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    ours = ranks_of_srun(STEP | {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"})
    where = {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "gpu03", "MASTER_PORT": "15172"}
    assert ours == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **where}
    assert ranks_of_srun(STEP | {"SLURM_STEP_NUM_NODES": "1"})["MASTER_ADDR"] == "127.0.0.1"
    for tasks, most in (("4(x2)", "4"), ("3,12", "12"), ("8", "8"), ("2(x16),1", "2")):
        assert ranks_of_srun(STEP | {"SLURM_STEP_TASKS_PER_NODE": tasks})["LOCAL_WORLD_SIZE"] == most
    ports = [
        ranks_of_srun(STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"]
        for job in range(100, 110)
        for step in range(5)
    ]
    assert len(set(ports)) == 50  # neighbours on one node do not meet
    assert all(1024 < int(port) < 32768 for port in ports)  # below the ports that systems give out
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert ranks_of_srun(STEP | {"SLURM_LOCALID": "1"})["LOCAL_RANK"] == "0"  # srun --gpus-per-task 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("env", "note"),
    [
        ({}, False),
        (SHELL, True),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, False),
        (STEP | {"RANK": "0"}, False),
        (SHELL | {"RANK": "0"}, False),
    ],
)
def test_a_process_that_srun_did_not_start_as_one_of_several_is_alone(env, note, capsys):
    assert ranks_of_srun(env) == {}
    assert ("not started by srun: it runs alone" in capsys.readouterr().out) == note


def test_the_shell_of_a_batch_script_does_not_wait_for_others(monkeypatch):
    for name, value in SHELL.items():
        monkeypatch.setenv(name, value)
    assert setup("cpu") == torch.device("cpu")
    assert not launched()
    assert not torch.distributed.is_initialized()


def test_addresses_that_the_user_has_set_stay(monkeypatch):
    for name, value in (STEP | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"}).items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # put back at the end
        monkeypatch.delenv(name)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_, **__: None)
    setup("cpu")
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("1", "2")
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.7", "4000")


def test_two_tasks_of_srun_are_one_run(heads, vae_run, tmp_path, monkeypatch):
    command = tiny.command_of("KL autoencoder", heads, vae_run, tmp_path / "two", 3)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NUM_NODES": "1"}
    processes = []
    for rank in ("0", "1"):
        with monkeypatch.context() as patch:
            for name, value in (STEP | job | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}).items():
                patch.setenv(name, value)
            processes.append(tiny.start(*command))
    said = []
    for process in processes:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, out + err
        said.append(out)
    assert said[0].count("new run of 3 steps") == 1
    assert "on each of 2 ranks" in said[0]
    assert said[1] == ""
    tiny.train(*tiny.command_of("KL autoencoder", heads, vae_run, tmp_path / "one", 3))
    for a, b in zip(*(tiny.lines(tmp_path / name) for name in ("one", "two")), strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
