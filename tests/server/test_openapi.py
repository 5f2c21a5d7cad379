"""The OpenAPI document, and that what it says of errors and base URLs is so."""

import logging
import socket
import time
from urllib.parse import urlsplit

import anthropic
import httpx
import openai
import pytest

from lightning_jax.server import wire

USER = [{"role": "user", "content": "2+2?"}]
BODIES = {
    "/chat/completions": {"messages": USER, "max_tokens": 2},
    "/completions": {"prompt": "2+2", "max_tokens": 2},
    "/responses": {"input": "2+2?", "max_output_tokens": 2},
    "/messages": {"messages": USER, "max_tokens": 2},
    "/messages/count_tokens": {"messages": USER},
}


@pytest.fixture(scope="module")
def document(serving):
    return serving.http.get("/openapi.json").raise_for_status().json()


def refs(node):
    if isinstance(node, dict):
        yield from ([node["$ref"]] if isinstance(node.get("$ref"), str) else [])
        for value in node.values():
            yield from refs(value)
    elif isinstance(node, list):
        for value in node:
            yield from refs(value)


def test_every_dialect_is_in_the_document_and_every_reference_leads_somewhere(document):
    for path in BODIES:
        for base in ("", "/rollout/{token}", "/rollout/{token}/model/{role}"):
            operation = document["paths"][f"{base}/v1{path}"]["post"]
            assert {"200", "400", "401", "404", "413", "429", "500"} <= operation["responses"].keys()
            names = [parameter["name"] for parameter in operation["parameters"]]
            assert names == [name for name in ("token", "role") if f"{{{name}}}" in base]
    assert "/api/jobs" in document["paths"]
    for ref in refs(document):
        assert ref.rpartition("/")[2] in document["components"]["schemas"], ref
    ids = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("path", BODIES)
def test_replies_and_errors_are_as_the_document_says(serving, document, path):
    responses = document["paths"][f"/v1{path}"]["post"]["responses"]

    def check(reply: httpx.Response):
        schema = responses[str(reply.status_code)]["content"]["application/json"]["schema"]["$ref"]
        required = document["components"]["schemas"][schema.rpartition("/")[2]]["required"]
        assert set(required) <= reply.json().keys()
        return reply

    for prefix in ("", "/v1", "/v1/v1"):
        check(serving.http.post(prefix + path, json=BODIES[path]).raise_for_status())
    assert check(serving.http.post(f"/v1{path}", json={})).status_code == 400
    assert check(serving.http.post(f"/v1{path}", content=b"{")).status_code == 400
    assert check(serving.http.post(f"/rollout/nobody{path}", json=BODIES[path])).status_code == 401
    job, leases, ids = serving.open()
    assert check(serving.http.post(f"/rollout/{leases[0]['token']}/model/%20{path}", json={})).status_code in (400, 404)
    serving.finish(job, leases, ids)


def test_a_body_that_is_too_large(serving):
    assert wire.MAX_BODY_BYTES == 32 * 2**20
    message = [{"role": "user", "content": "x" * wire.MAX_BODY_BYTES}]
    with openai.OpenAI(base_url=serving.url, api_key="any", max_retries=0) as client:
        with pytest.raises(openai.APIStatusError, match="too large") as caught:
            client.chat.completions.create(model="m", messages=message)
    assert caught.value.status_code == 413
    with anthropic.Anthropic(base_url=serving.url, api_key="any", max_retries=0) as client:
        with pytest.raises(anthropic.RequestTooLargeError, match="too large"):
            client.messages.create(model="m", max_tokens=1, messages=message)

    def pieces():
        for _ in range(33):
            yield b"x" * 2**20

    assert serving.http.post("/v1/responses", content=pieces()).status_code == 413


def test_a_client_that_leaves_in_mid_body_is_no_error(serving, caplog):
    url = urlsplit(serving.url)
    with socket.create_connection((url.hostname, url.port)) as client:
        client.sendall(b"POST /v1/responses HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n{")
        time.sleep(0.2)  # the server has begun to read
    time.sleep(0.5)
    assert serving.http.get("/health").status_code == 200
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_model_by_its_name(serving):
    with openai.OpenAI(base_url=serving.url, api_key="any", max_retries=0) as client:
        assert client.models.retrieve(serving.policy.name).id == serving.policy.name
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("none-such")
