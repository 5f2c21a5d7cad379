"""A pool's line to a server that is in trouble: how often it asks, and when it gives up."""

import contextlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable

import pytest

from agent_lightning import KeyRefusedError, Pool, ServerConnectionError
from agent_lightning.leases import Leases
from agent_lightning.transport import Transport
from tests.agent_lightning.conftest import wait_until


class Answering(http.server.ThreadingHTTPServer):
    """Answers with what `answer(a request's body, its connection)` says: the status of an error, or leases."""

    def __init__(self, answer: Callable[[dict, socket.socket], int | list[dict]]):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                said = answer(body, self.connection)
                if isinstance(said, int):
                    self.send_error(said)
                    return
                reply = json.dumps({"leases": said, "cancelled": [], "job_status": "running"}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)
                self.close_connection = True

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.times: list[float] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def answering():
    servers = []

    def start(answer):
        servers.append(Answering(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def always(answering):
    """Answers every request with one status, and notes when each arrived."""

    def start(status):
        def answer(body, connection):
            server.times.append(time.monotonic())
            return status

        server = answering(answer)
        return server

    return start


def test_a_server_in_trouble_is_asked_a_few_times_a_second(always):
    server = always(503)
    pool = Pool(server.url, "job", lambda resource, task: 1, 1, max_retries=0, give_up_s=1.5)
    with pytest.raises(ServerConnectionError, match="the server answered 503"):
        pool.run()
    assert server.times[-1] - server.times[0] >= 1.0
    assert 4 <= len(server.times) <= 12  # two threads, each every 0.5 s


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_pool_at_once(always, status):
    server = always(status)
    pool = Pool(server.url, "job", lambda resource, task: 1, 1, api_key="wrong", give_up_s=300.0)
    start = time.monotonic()
    with pytest.raises(KeyRefusedError, match="(?s)refused the API key.*AGENT_LIGHTNING_API_KEY"):
        pool.run()
    assert time.monotonic() - start < 20  # most of it for the worker's end
    assert len(server.times) <= 2


def test_stop_ends_the_waiting_between_exchanges(always, monkeypatch):
    monkeypatch.setattr("agent_lightning.leases.RETRY_S", 1000.0)
    server = always(503)
    pool = Pool(server.url, "job", lambda resource, task: 1, 1, max_retries=0)
    before = set(threading.enumerate())
    thread = threading.Thread(target=pool.run)
    thread.start()
    wait_until(lambda: len(server.times) == 2)
    pool.stop()
    thread.join(20)
    assert not thread.is_alive()
    wait_until(lambda: not any(t.name.startswith("leases") for t in set(threading.enumerate()) - before))


def test_a_request_sent_again_names_the_leases_that_arrived_meanwhile(answering):
    """Others the server would take for lost. The asker's request fails; meanwhile the reporter gets a lease."""
    waits, granted, again = threading.Event(), threading.Event(), []

    def answer(body, connection):
        if body["wait_s"] and not waits.is_set():
            waits.set()
            granted.wait(10)
            return 503
        if body["wait_s"]:
            again.append(body["running"])
        return [{"lease_id": "new"}] if body["results"] else []

    with contextlib.closing(Transport(answering(answer).url, max_retries=3)) as transport:
        leases = Leases(transport, "job", give_up_s=60.0, wake=lambda: None)
        leases.add(workers=1)
        leases.start()
        assert waits.wait(10)
        leases.add(workers=1, result={"lease_id": "old", "reward": 1.0})
        wait_until(lambda: leases.take()[0])
        granted.set()
        wait_until(lambda: again)
        leases.stop()
    assert again[0] == ["new"]


def test_a_short_timeout_is_no_outage_while_the_server_holds_requests(answering):
    """Nor may a request that nobody reads any more be left at the server, which would hand it leases."""
    held, broken = [], []

    def answer(body, connection):
        connection.settimeout(body["wait_s"] or 0.001)
        try:
            broken.append(connection.recv(1))  # b"": the pool has hung up
        except TimeoutError:
            connection.settimeout(None)
        if body["wait_s"]:
            held.append(body["wait_s"])
        return []

    with contextlib.closing(Transport(answering(answer).url, timeout_s=1.5, max_retries=0)) as transport:
        leases = Leases(transport, "job", give_up_s=0.1, wake=lambda: None)
        leases.add(workers=1)
        leases.start()
        wait_until(lambda: len(held) == 3 or broken)
        leases.stop()
    assert not broken and leases.failure is None and max(held) < 1.0
