"""The notebooks run from top to bottom, and what they show is there."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_quickstart(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}  # of the kernel and all that it starts
    try:
        NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
        ).execute()
    finally:
        os.environ.clear()
        os.environ |= before

    def shown(source: str) -> dict:
        (cell,) = [cell for cell in notebook.cells if source in cell.source]
        return {
            kind: data
            for output in cell.outputs
            for kind, data in (output.get("data") or {"text": output.text}).items()
        }

    assert "TrainingResult(final_reward=" in shown("client.train(")["text/plain"]
    assert shown("client.train(")["text/html"].startswith("<")
    assert shown("result.plot()")["image/png"]
    assert " -> " in shown("client.trajectories(")["text"]
    assert "EvalResult(" in shown("client.evaluate(")["text/plain"]
    assert "tokenizer.json" in shown("client.download_model(")["text/plain"]
    assert "tensors" in shown("safe_open")["text"]
