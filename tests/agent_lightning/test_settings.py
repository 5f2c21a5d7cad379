"""Arguments win over variables, variables over defaults, and a bad one is named."""

import re

import pytest

from agent_lightning import Client, InvalidConfigError, settings


def test_server_url(monkeypatch):
    with pytest.raises(InvalidConfigError, match="AGENT_LIGHTNING_SERVER_URL"):
        settings.server_url()
    monkeypatch.setenv("AGENT_LIGHTNING_SERVER_URL", "http://from-variable:1/")
    assert settings.server_url() == "http://from-variable:1"
    assert settings.server_url("https://argument") == "https://argument"
    with pytest.raises(InvalidConfigError, match="server_url='localhost:8000'"):
        settings.server_url("localhost:8000")
    monkeypatch.setenv("AGENT_LIGHTNING_SERVER_URL", "nonsense")
    with pytest.raises(InvalidConfigError, match="AGENT_LIGHTNING_SERVER_URL='nonsense'"):
        settings.server_url()


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://localhost:99999", "http://exa mple:80", "http://a\nb", "http://:80"]
)
def test_what_is_no_url_is_named(url):
    with pytest.raises(InvalidConfigError, match=re.escape(f"server_url={url!r} is not a URL")):
        Client(url)
    with pytest.raises(InvalidConfigError, match="is not a URL"):
        Client("http://xn--\u00fc.example")  # only the HTTP library knows


@pytest.mark.parametrize("url", ["http://h:8000/v1", "http://h/v1/", "http://h/?a=b", "http://h#f", "http://h/lab/v1"])
def test_more_than_the_base_url_is_refused(url):
    with pytest.raises(InvalidConfigError, match=re.escape(f"server_url={url!r} is more than the server's base URL")):
        Client(url)
    assert Client("http://v1/lab").server_url == "http://v1/lab"  # behind a proxy


def test_white_space_around_url_and_key_is_no_part_of_them(monkeypatch):
    assert Client(" http://localhost:8000/\n").server_url == "http://localhost:8000"
    assert settings.api_key("secret\n") == "secret"
    monkeypatch.setenv("AGENT_LIGHTNING_API_KEY", "\n")
    assert settings.api_key() is None


@pytest.mark.parametrize("key", ["schl\u00fcssel", "two\nlines"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key, monkeypatch):
    with pytest.raises(InvalidConfigError, match="^api_key has a character") as caught:
        Client("http://localhost:8000", api_key=key)
    assert key not in str(caught.value) and key[:3] not in str(caught.value)
    monkeypatch.setenv("AGENT_LIGHTNING_API_KEY", key)
    with pytest.raises(InvalidConfigError, match="^AGENT_LIGHTNING_API_KEY has a character"):
        Client("http://localhost:8000")


def test_api_key(monkeypatch):
    assert settings.api_key() is None
    monkeypatch.setenv("AGENT_LIGHTNING_API_KEY", "variable")
    assert settings.api_key() == "variable"
    assert settings.api_key("argument") == "argument"


def test_max_retries(monkeypatch):
    assert settings.max_retries() == 3
    monkeypatch.setenv("LIGHTNING_MAX_RETRIES", "7")
    assert settings.max_retries() == 7
    assert settings.max_retries(0) == 0
    monkeypatch.setenv("LIGHTNING_MAX_RETRIES", "many")
    with pytest.raises(InvalidConfigError, match="LIGHTNING_MAX_RETRIES='many'"):
        settings.max_retries()
    with pytest.raises(InvalidConfigError, match="max_retries=-1"):
        settings.max_retries(-1)
