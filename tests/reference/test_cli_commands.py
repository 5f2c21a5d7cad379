"""CLI Commands: as printed, in the printed order, against one server."""


def test_start_lightning_server(command):
    # The shared server was started like this on one device; here only what it would need on four is asked for.
    said = command(
        """agent-lightning server start \\
    --model builtin:tiny \\
    --gpus 4 \\
    --port 8000 \\
    --algorithm grpo \\
    --config.mode=plan""",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )
    assert "everything fits" in said


def test_upload_train_evaluate_download(command, project):
    said = command(
        """agent-lightning data upload \\
    --train train.jsonl \\
    --test test.jsonl \\
    --data-id my-dataset"""
    )
    assert said.strip() == "my-dataset"

    said = command(
        """agent-lightning train \\
    --agent-script my_agent.py \\
    --data-id my-dataset \\
    --nworkers 8 \\
    --epochs 3"""
    )
    assert "steps: 3 in " in said and "held-out reward: " in said
    checkpoint = next(line for line in said.splitlines() if line.startswith("last checkpoint: ")).rpartition("/")[2]

    said = command(
        """agent-lightning evaluate \\
    --agent-script my_agent.py \\
    --checkpoint checkpoints/latest \\
    --test test.jsonl"""
    )
    assert "4 tasks" in said

    command(
        f"""agent-lightning model download \\
    --checkpoint checkpoints/{checkpoint} \\
    --output trained_model/"""
    )
    assert (project / "trained_model" / "model.safetensors").stat().st_size > 1e6
