"""A proxy in the environment, as companies set it, and a server on this machine that it cannot reach."""

import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path
from urllib.request import proxy_bypass_environment

import httpx
import pytest

from agent_lightning.loopback import direct, loopback_host

ROOT = Path(__file__).resolve().parents[2]
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def proxied(monkeypatch):
    """A process with a proxy for everything, at which nobody answers."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, NOBODY)
        monkeypatch.setenv(name.lower(), NOBODY)


@pytest.mark.parametrize(
    "url, host",
    [
        ("http://127.0.0.1:8000", "127.0.0.1"),
        ("http://127.3.2.1", "127.3.2.1"),
        ("http://LOCALHOST:1/x", "localhost"),
        ("https://[::1]:8000", "::1"),
        ("http://0.0.0.0:8000", "0.0.0.0"),
        ("http://10.0.0.1:8000", None),
        ("http://localhost.example.com", None),
        ("https://127.0.0.1.example.com", None),
    ],
)
def test_loopback_host(url, host):
    assert loopback_host(url) == host


@pytest.mark.parametrize(
    "environ, no_proxy",
    [
        ({"HTTP_PROXY": NOBODY}, "127.0.0.1"),
        ({"https_proxy": NOBODY, "NO_PROXY": "corp.example"}, "corp.example,127.0.0.1"),
        ({"https_proxy": NOBODY, "no_proxy": "corp.example"}, "corp.example,127.0.0.1"),
        ({"HTTP_PROXY": NOBODY, "no_proxy": ""}, "127.0.0.1"),
        ({"HTTP_PROXY": NOBODY, "no_proxy": "*"}, "*"),
    ],
)
def test_direct_keeps_what_is_there(environ, no_proxy):
    variables = direct("http://127.0.0.1:8000", environ)
    assert variables == {"NO_PROXY": no_proxy, "no_proxy": no_proxy}
    assert proxy_bypass_environment("127.0.0.1:8000", {"no": no_proxy})


def test_direct_leaves_other_environments_alone():
    assert direct("http://10.0.0.1:8000", {"HTTP_PROXY": NOBODY}) == {}
    assert direct("http://127.0.0.1:8000", {"HTTP_PROXY": "", "PATH": "/bin"}) == {}


def test_rollouts_and_every_sdk_in_an_agent_reach_the_server(served, proxied):
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/health")  # the proxy is in force

    def agent(resource, task):
        import json
        import urllib.request

        import anthropic
        import openai

        messages = [{"role": "user", "content": "1+1=?"}]
        options = {"model": resource.model_name, "messages": messages, "max_tokens": 2}
        openai.OpenAI(max_retries=0).chat.completions.create(**options)
        anthropic.Anthropic(max_retries=0).messages.create(**options)
        url = f"{resource.model_api}/v1/chat/completions"
        httpx.post(url, json=options, timeout=60).raise_for_status()
        request = urllib.request.Request(url, json.dumps(options).encode(), {"Content-Type": "application/json"})
        urllib.request.urlopen(request).read()
        try:
            httpx.get("http://example.invalid")
        except httpx.ConnectError as error:  # the proxy's refusal; without a proxy, a name that does not exist
            return "refused" in str(error)

    (record,) = served.run(agent, [{}], nworkers=1)
    assert record.reward == 1.0, record.traceback


def test_a_client_process_reaches_the_server(served, proxied, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "1+1=?"}\n')
    script = (
        "import sys; from agent_lightning import Client; print(Client(sys.argv[1]).upload_data(sys.argv[2], None, 'd'))"
    )
    command = [sys.executable, "-c", script, served.url, str(tmp_path / "train.jsonl")]
    environment = os.environ | {"LIGHTNING_MAX_RETRIES": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "d\n"), done.stderr


def test_a_server_elsewhere_is_asked_through_the_proxy(proxied, monkeypatch):
    from agent_lightning.transport import Transport

    asked = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_address[1]}")
        assert Transport("http://lightning.example:8000").request("GET", "/health") == {}
        proxy.shutdown()
    assert asked == ["http://lightning.example:8000/health"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_certificates_of_the_environment_count_on_loopback_too(host, monkeypatch, tmp_path):
    from agent_lightning.transport import Transport

    (tmp_path / "broken.pem").write_text("no certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "broken.pem"))
    with pytest.raises(Exception, match="PEM|X509|SSL"):
        Transport(f"https://{host}:8000")
