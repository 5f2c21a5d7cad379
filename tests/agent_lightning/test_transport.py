"""Retries, and errors as exceptions: against a socket that answers whatever the test says."""

import http.server
import json
import threading
import time

import pytest

from agent_lightning import (
    AgentLightningError,
    DataUploadError,
    InvalidConfigError,
    KeyRefusedError,
    ServerConnectionError,
)
from agent_lightning.transport import Transport


class Scripted(http.server.ThreadingHTTPServer):
    """Answers with the given (status, headers, body) in turn, and notes what it was asked."""

    def __init__(self, *answers):
        scripted = self
        self.answers, self.bodies, self.headers, self.times = list(answers), [], [], []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                scripted.times.append(time.monotonic())
                scripted.headers.append(dict(self.headers))
                if "Content-Length" in self.headers:
                    scripted.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                else:
                    scripted.bodies.append(self.read_chunks())
                status, headers, body = scripted.answers.pop(0)
                if status is None:
                    self.close_connection = True
                    return
                payload = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": len(payload)}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(payload)

            def read_chunks(self):
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def answering():
    servers = []

    def start(*answers):
        servers.append(Scripted(*answers))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


OK = (200, {}, {"x": 1})


@pytest.mark.parametrize("trouble", [(503, {}, b"busy"), (502, {}, {}), (None, {}, b"")], ids=["503", "502", "hang-up"])
def test_trouble_is_tried_again(answering, trouble):
    server = answering(trouble, trouble, OK)
    assert Transport(server.url, max_retries=2).request("POST", "/", json={"a": 1}) == {"x": 1}
    assert [json.loads(body) for body in server.bodies] == [{"a": 1}] * 3
    gaps = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    assert gaps[0] >= 0.1 and gaps[1] >= 0.2  # half of 0.2 s, then of 0.4 s


def test_retries_end(answering):
    server = answering((503, {}, b"the model is loading"), (503, {}, b"the model is loading"), OK)
    with pytest.raises(ServerConnectionError, match="503: the model is loading"):
        Transport(server.url, max_retries=1).request("POST", "/")


def test_retry_after_is_heeded(answering):
    server = answering((429, {"Retry-After": "1"}, {"error": {"message": "queue full"}}), OK)
    assert Transport(server.url).request("POST", "/") == {"x": 1}
    assert server.times[1] - server.times[0] >= 1.0


def test_a_streamed_body_is_made_again_for_a_retry(answering):
    server = answering((503, {}, b""), OK)
    Transport(server.url).request("POST", "/", content=lambda: iter([b"ab", b"c"]))
    assert server.bodies == [b"abc", b"abc"]


def test_the_key_is_sent(answering):
    server = answering(OK)
    Transport(server.url, api_key="secret").request("POST", "/")
    assert server.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    "answer, error, says",
    [
        ((422, {}, {"error": {"type": "DataUploadError", "message": "line 3: bad"}}), DataUploadError, "line 3: bad"),
        ((400, {}, {"error": {"type": "InvalidConfigError", "message": "no", "hint": "so"}}), InvalidConfigError, "so"),
        ((401, {}, {"error": {"type": "authentication_error", "message": "no"}}), KeyRefusedError, "API_KEY"),
        ((403, {}, b"not for you"), KeyRefusedError, "refused the API key: not for you"),
        ((404, {}, {"detail": "Not Found"}), AgentLightningError, r"POST / failed \(404\)"),
        ((400, {}, {"error": {"type": "SystemExit", "message": "m"}}), AgentLightningError, r"\(400\): m"),
    ],
)
def test_an_error_is_raised_as_the_class_it_names_and_not_retried(answering, answer, error, says):
    server = answering(answer, OK)
    with pytest.raises(error, match=says) as caught:
        Transport(server.url).request("POST", "/")
    assert type(caught.value) is error
    assert len(server.answers) == 1


def test_somebody_else_there(answering):
    server = answering((200, {"Content-Type": "text/html"}, b"<html>Welcome</html>"), OK)
    with pytest.raises(ServerConnectionError, match=f"something else answers at {server.url}.*\n.*correct the URL"):
        Transport(server.url).request("POST", "/api/datasets")
    assert len(server.answers) == 1


def test_nobody_there():
    with pytest.raises(ServerConnectionError, match="http://127.0.0.1:9.*\n.*agent-lightning server start"):
        Transport("http://127.0.0.1:9", max_retries=1).request("GET", "/health")


def test_no_answer_in_time(answering):
    server = answering()
    server.answers = type("Slow", (), {"pop": lambda self, i: time.sleep(1.5) or OK})()
    with pytest.raises(ServerConnectionError, match="ReadTimeout"):
        Transport(server.url, timeout_s=0.3, max_retries=0).request("POST", "/")
