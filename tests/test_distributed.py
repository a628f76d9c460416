import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from segkit.core.registry import architectures

SCRIPT = Path(__file__).parent/"two_processes.py"

def launch(folder, **env):
    return subprocess.Popen([sys.executable, "-W", "ignore", SCRIPT, folder], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

@pytest.fixture(scope="module")
def results(tmp_path_factory):
    "What one process wrote, and each of two that trained together"
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    jobs = [launch(folder, RANK=str(r), LOCAL_RANK=str(r), **together) for r in range(2)]
    try:
        for job in jobs:
            said, _ = job.communicate(timeout=250)
            assert job.returncode == 0, said
        alone = launch(folder)
        said, _ = alone.communicate(timeout=250)
        assert alone.returncode == 0, said
    finally:
        for job in jobs: job.kill()
    return [json.loads((folder/f"{name}.json").read_text()) for name in ("0-0", "2-0", "2-1")]

def test_losses(results):
    alone, *two = results
    assert len(alone["losses"]) == 4
    mean = [sum(pair)/2 for pair in zip(*(r["losses"] for r in two))]
    assert mean == pytest.approx(alone["losses"], rel=1e-4)
    assert two[0]["losses"] != two[1]["losses"]

def test_weights_of_model_and_loss(results):
    alone, *two = results
    assert "log_variances" in alone["weights"]
    for r in two: assert r["weights"] == pytest.approx(alone["weights"], rel=1e-4)
    assert two[0]["weights"] == two[1]["weights"]

def test_scores_with_an_odd_number_of_pictures(results):
    alone, *two = results
    for r in two:
        for name in ("mask_miou", "mask_dice"): assert r["scores"][name] == pytest.approx(alone["scores"][name], rel=1e-3)
        for name in ("valid_loss", "mask_loss", "label_loss", "label_accuracy"): assert r["scores"][name] == pytest.approx(alone["scores"][name], rel=1e-4), name
    assert all(r["training"] for r in results)

def test_resumed(results):
    for r in results[1:]: assert r["resumed"] == pytest.approx(r["losses"][2:], rel=1e-5)

def test_every_architecture(results):
    for r in results[1:]: assert r["architectures"] == sorted(architectures)
