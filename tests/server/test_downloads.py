"""Models from a real server: what arrives is the policy that samples, and nothing that broke off looks like it."""

import asyncio
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fastapi
import httpx
import numpy as np
import pytest
import safetensors.numpy

from agent_lightning import Client
from agent_lightning.exceptions import InvalidConfigError, ServerConnectionError
from lightning_jax.server import downloads
from lightning_jax.store import UnknownError

from .conftest import TOOL_CALL

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ("huggingface", "safetensors", "onnx")


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def assert_is_the_policy(running, logits_tv, atol):
    """The log-probs of what the live policy sampled are those with which it sampled them."""
    ids, logprobs = running.said
    first = len(ids) - len(logprobs)
    found = log_softmax(logits_tv[first - 1 : -1])[np.arange(len(logprobs)), ids[first:]]
    np.testing.assert_allclose(found, logprobs, rtol=0, atol=atol)


def transformers_logits(folder, ids):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)[None]).logits[0].float().numpy()


def onnx_logits(folder, ids):
    """One token after the other through onnxruntime, with the cache."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    shapes = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past")}
    cache = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}
    logits = []
    for position, index in enumerate(ids):
        feed = {"input_ids": [[index]], "attention_mask": [[1] * (position + 1)], "position_ids": [[position]]}
        feed = {name: np.array(value, np.int64) for name, value in feed.items()}
        found = dict(zip(outputs, session.run(None, feed | cache), strict=True))
        logits.append(found.pop("logits")[0, 0])
        cache = {name.replace("present", "past_key_values"): value for name, value in found.items()}
    return np.stack(logits)


def test_huggingface_is_the_policy(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    with Client(trained.url) as client:
        folder = client.download_model(str(tmp_path / "model"))
    assert folder == tmp_path / "model"
    logits = transformers_logits(folder, trained.said[0])
    assert_is_the_policy(trained, logits, 1e-4)
    text = "<|user|>\ntwo and two"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer(text, add_special_tokens=False).input_ids == trained.policy.tokenizer.encode(text)
    assert tokenizer.chat_template == trained.policy.tokenizer.chat_template
    ends = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    assert set(ends if isinstance(ends, list) else [ends]) == set(trained.policy.tokenizer.eos_ids)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_onnx_is_the_policy(trained, tmp_path):
    with Client(trained.url) as client:
        folder = client.download_model(tmp_path / "model", format="onnx")
    assert_is_the_policy(trained, onnx_logits(folder, trained.said[0]), 1e-3)
    assert {"config.json", "tokenizer.json", "model.onnx"} <= {path.name for path in folder.iterdir()}


def test_every_checkpoint_has_its_own_weights(trained, random_model, tmp_path):
    def weights(**asked):
        folder = client.download_model(tmp_path / str(len(list(tmp_path.iterdir()))), format="safetensors", **asked)
        assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
        return safetensors.numpy.load_file(folder / "model.safetensors")

    def same(one, other):
        assert one.keys() == other.keys()
        return all(np.array_equal(one[name], other[name]) for name in one)

    first_path, last_path = trained.result.checkpoints
    with Client(trained.url) as client:
        initial, first, last = weights(checkpoint="initial"), weights(checkpoint="step-1"), weights()
        assert same(weights(checkpoint=first_path), first) and same(weights(checkpoint=Path(last_path)), last)
        assert same(weights(checkpoint="checkpoints/latest"), last)
    assert same(initial, safetensors.numpy.load_file(random_model / "model.safetensors"))
    assert not same(initial, first) and not same(first, last)


def test_before_any_training_the_latest_is_the_initial_model(serving, random_model, tmp_path):
    with Client(serving.url) as client:
        folder = client.download_model(tmp_path / "model")
    theirs = safetensors.numpy.load_file(random_model / "model.safetensors")
    ours = safetensors.numpy.load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_what_there_is_not(trained, tmp_path):
    (tmp_path / "file").write_text("")
    with Client(trained.url) as client:
        for asked, text in [
            ({"checkpoint": "step-7"}, "step-1, step-2, latest"),
            ({"checkpoint": "best"}, "held-out"),
            ({"format": "gguf"}, "huggingface, safetensors, onnx, peft"),
            ({"format": "peft"}, "has no adapters"),
        ]:
            with pytest.raises(InvalidConfigError, match=text):
                client.download_model(tmp_path / "model", **asked)
        with pytest.raises(InvalidConfigError, match="not a folder"):
            client.download_model(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    files = trained.http.get("/api/models/exports", params={"format": "huggingface", "wait_s": 20}).json()
    for name in ("nope", "..%2F..%2Fstore.sqlite3", "..%2Fmodel.safetensors"):
        reply = trained.http.get(f"/api/models/exports/{files['export_id']}/{name}")
        assert reply.status_code == 404, name


def test_several_at_a_time(trained, tmp_path):
    """Six downloads, of three formats, at once: all whole."""
    with Client(trained.url) as client, ThreadPoolExecutor(6) as pool:
        jobs = [(form, tmp_path / f"{form}-{copy}") for form in FORMATS for copy in range(2)]
        list(pool.map(lambda job: client.download_model(job[1], "step-1", job[0]), jobs))
    for form, folder in jobs:
        names = sorted(path.name for path in folder.iterdir())
        assert names == sorted(path.name for path in (tmp_path / f"{form}-0").iterdir())
        for name in names:
            assert (folder / name).read_bytes() == (tmp_path / f"{form}-0" / name).read_bytes()


def test_into_a_folder_that_holds_another_model(trained, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    old = {"config.json": "{}", "model-00001-of-00002.safetensors": "x", "model.onnx_data": "x"}
    for name, text in (old | {"README.md": "mine"}).items():
        (target / name).write_text(text)
    with Client(trained.url) as client:
        client.download_model(target)
    assert (target / "README.md").read_text() == "mine"
    assert json.loads((target / "config.json").read_text())["model_type"] == "llama"
    assert not list(target.glob("model-*")) and not (target / "model.onnx_data").exists()
    assert_is_the_policy(trained, transformers_logits(target, trained.said[0]), 1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_of_several_models_each_has_its_own(start, random_model, tool_model, tmp_path):
    two = start({"query": random_model, "answer": tool_model})
    two.policies.prepare_training()
    two.policies.save_checkpoint({"job_id": "", "step": 0})
    part = f"{two.config.workdir}/checkpoints/step-0/answer"
    query, answer = [safetensors.numpy.load_file(folder / "model.safetensors") for folder in (random_model, tool_model)]
    asked = [
        ({}, query),
        ({"model": "query", "checkpoint": "initial"}, query),
        ({"model": "answer"}, answer),
        ({"model": "2", "checkpoint": "initial"}, answer),
        ({"checkpoint": part}, answer),
        ({"checkpoint": part, "model": "answer"}, answer),
        ({"checkpoint": part, "model": "2"}, answer),
    ]
    with Client(two.url) as client:
        for number, (options, expected) in enumerate(asked):
            folder = client.download_model(tmp_path / str(number), **options)
            found = safetensors.numpy.load_file(folder / "model.safetensors")
            assert found.keys() == expected.keys() and all(np.array_equal(found[k], expected[k]) for k in found)
        assert (folder / "tokenizer.json").read_bytes() == (tool_model / "tokenizer.json").read_bytes()
        with pytest.raises(InvalidConfigError, match="query, answer"):
            client.download_model(tmp_path / "none", model="judge")
        with pytest.raises(InvalidConfigError, match="step-0/answer is not of the model 'query'"):
            client.download_model(tmp_path / "none", part, model="query")

        job, (lease,), ids = two.open()
        body = {"messages": [{"role": "user", "content": "2+2?"}], "max_tokens": 20}
        for role in ("1", "answer"):
            httpx.post(f"{two.model_api(lease)}/model/{role}/v1/chat/completions", json=body, timeout=60)
        two.finish(job, [lease], ids)
        (trajectory,) = client.trajectories(job)
    assert [t.metadata["model"] for t in trajectory.transitions] == ["query", "answer"]
    assert [t.metadata["role"] for t in trajectory.transitions] == ["query", "answer"]
    assert trajectory.transitions[1].output == f"<tool_call>{TOOL_CALL}</tool_call>"


# ---- what goes wrong on the way ----


class Proxy:
    """A TCP proxy to a server; `spoil(bytes sent so far, chunk)` is what goes on to the client, None cuts it off."""

    def __init__(self, url, spoil):
        self._to, self._spoil = httpx.URL(url), spoil
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._listener.close()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection((self._to.host, self._to.port))
            threading.Thread(target=self._pump, args=(near, far, self._note), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, self._spoil), daemon=True).start()

    def _note(self, sent, chunk):
        self.requests.append(chunk.decode())
        return chunk

    @staticmethod
    def _pump(source, sink, change):
        sent = 0
        try:
            while chunk := source.recv(4096):
                chunk = change(sent, chunk)
                if chunk is None:
                    break
                sink.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass
        for side in (source, sink):
            try:
                side.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def requests_for_weights(proxy):
    return [text for text in proxy.requests if "/model.safetensors " in text]


def test_a_connection_that_breaks_is_taken_up_where_it_broke(trained, tmp_path):
    cuts = iter([100_000, 100_000])
    limit = [next(cuts)]

    def cut(sent, chunk):
        if limit[0] is not None and sent > limit[0]:
            limit[0] = next(cuts, None)
            return None
        return chunk

    proxy = Proxy(trained.url, cut)
    with Client(proxy.url) as client:
        folder = client.download_model(tmp_path / "model")
    proxy.close()
    ranges = [text.lower().partition("range: bytes=")[2].partition("-")[0] for text in requests_for_weights(proxy)]
    assert len(ranges) == 3 and ranges[0] == "" and 0 < int(ranges[1]) < int(ranges[2])
    assert_is_the_policy(trained, transformers_logits(folder, trained.said[0]), 1e-4)


@pytest.mark.parametrize("times", [1, 10**9], ids=["once", "always"])
def test_a_damaged_byte_is_noticed(trained, tmp_path, times):
    left = [times]

    def damage(sent, chunk):
        if left[0] and len(chunk) == 4096 and not chunk.startswith(b"HTTP"):  # in the midst of the weights
            left[0] -= 1
            chunk = bytes([chunk[0] ^ 1]) + chunk[1:]
        return chunk

    proxy = Proxy(trained.url, damage)
    with Client(proxy.url, max_retries=1) as client:
        if times == 1:
            folder = client.download_model(tmp_path / "model")
            assert_is_the_policy(trained, transformers_logits(folder, trained.said[0]), 1e-4)
        else:
            with pytest.raises(ServerConnectionError, match="SHA-256"):
                client.download_model(tmp_path / "model")
            assert not (tmp_path / "model").exists()
    proxy.close()
    assert len(requests_for_weights(proxy)) == 2


@pytest.mark.parametrize("is_new", [True, False], ids=["new folder", "folder with a model"])
def test_a_killed_download_leaves_no_model_and_is_gone_on_with(trained, tmp_path, is_new):
    target = tmp_path / "model"
    with Client(trained.url) as client:
        if not is_new:
            client.download_model(target, "step-1")
        before = {path.name: path.read_bytes() for path in target.iterdir()} if target.exists() else None
        slow = Proxy(trained.url, lambda sent, chunk: time.sleep(0.05 if sent > 50_000 else 0) or chunk)
        code = f"from agent_lightning import Client; Client({slow.url!r}).download_model({str(target)!r})"
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
        try:
            arriving = tmp_path / ".model.partial" / "model.safetensors.part"
            deadline = time.monotonic() + 60
            while not (arriving.exists() and arriving.stat().st_size > 50_000):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            with pytest.raises(InvalidConfigError, match="another download"):
                client.download_model(target)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            slow.close()

        if is_new:
            assert not target.exists()
        else:
            assert {path.name: path.read_bytes() for path in target.iterdir()} == before
        found = {path.name for path in (tmp_path / ".model.partial").iterdir()}
        assert not found & {"config.json", "model.safetensors"}, "nothing that loads"

        proxy = Proxy(trained.url, lambda sent, chunk: chunk)
        with Client(proxy.url) as again:
            again.download_model(target)
        proxy.close()
    (request,) = requests_for_weights(proxy)
    assert "range: bytes=" in request.lower()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_is_the_policy(trained, transformers_logits(target, trained.said[0]), 1e-4)


def test_leftovers_of_another_download_do_no_harm(trained, tmp_path):
    partial = tmp_path / ".model.partial"
    partial.mkdir()
    (partial / "model.safetensors.part").write_bytes(b"x" * 1000)
    (partial / "config.json").write_text("{}")
    (partial / "model.onnx").write_text("x")
    with Client(trained.url, max_retries=0) as client:
        client.download_model(tmp_path / "model")
    assert not (tmp_path / "model" / "model.onnx").exists() and not partial.exists()
    assert_is_the_policy(trained, transformers_logits(tmp_path / "model", trained.said[0]), 1e-4)


def test_an_export_that_is_gone_is_made_again(trained, tmp_path, monkeypatch):
    """As after a restart of the server, or once it has tidied up: the same files, under the same id."""
    ask = {"checkpoint": "step-1", "format": "safetensors", "wait_s": 20}
    before = trained.http.get("/api/models/exports", params=ask).json()
    url = f"/api/models/exports/{before['export_id']}/model.safetensors"
    content = trained.http.get(url).content
    (file,) = before["files"]
    assert hashlib.sha256(content).hexdigest() == file["sha256"] and len(content) == file["size"]
    monkeypatch.setattr(downloads, "_KEEP_S", -1.0)
    other = trained.http.get("/api/models/exports", params=ask | {"checkpoint": "initial", "format": "onnx"}).json()
    assert other["files"], "what is not used is looked for behind every export"
    wait_until(lambda: trained.http.get(url).status_code == 404)
    monkeypatch.setattr(downloads, "_KEEP_S", 900.0)
    assert trained.http.get("/api/models/exports", params=ask).json() == before
    with Client(trained.url) as client:
        assert (client.download_model(tmp_path / "m", **{k: ask[k] for k in ("checkpoint", "format")})).is_dir()


def test_an_export_is_kept_for_as_long_as_a_file_of_it_is_sent(trained, tmp_path, monkeypatch):
    """Over a link so slow that the file takes longer than an export is kept which nobody reads."""
    monkeypatch.setattr(downloads, "_KEEP_S", 2.0)
    app = fastapi.FastAPI()
    app.include_router(downloads.router)
    app.state.exports = exports = downloads.Exports(trained.policies, tmp_path / "exports")
    item = exports.open("initial", "safetensors")
    (file,) = item.files.result(60)

    async def send(message):
        await asyncio.sleep(1.2)
        exports._remove_unused()

    async def receive():
        await asyncio.Event().wait()

    scope = {"type": "http", "method": "GET", "path": f"/api/models/exports/{item.export_id}/{file['name']}"}
    scope |= {"headers": [], "query_string": b"", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}
    asyncio.run(app(scope, receive, send))
    assert exports.with_file(item.export_id, file["name"]), "it is still there"
    exports.close()


def test_an_export_is_asked_for_again_as_long_as_files_arrive(trained, tmp_path, monkeypatch):
    """It is gone whenever the next file is asked for."""
    find, names = downloads.Exports.with_file, set()

    def found_the_second_time(exports, export_id, name):
        if name not in names:
            names.add(name)
            raise UnknownError(f"there is no file {name!r}")
        return find(exports, export_id, name)

    monkeypatch.setattr(downloads.Exports, "with_file", found_the_second_time)
    with Client(trained.url) as client:
        folder = client.download_model(tmp_path / "model")
        assert {path.name for path in folder.iterdir()} == names and len(names) > 4
        monkeypatch.setattr(
            downloads.Exports, "with_file", lambda exports, export_id, name: find(exports, "none", name)
        )
        with pytest.raises(InvalidConfigError, match="there is no file"):
            client.download_model(tmp_path / "none")


def wait_until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
